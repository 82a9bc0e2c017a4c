//! memcached: for a CGI process [`blocking`], for the persistent mode [`pipelined`].

pub mod blocking;
pub mod pipelined;
