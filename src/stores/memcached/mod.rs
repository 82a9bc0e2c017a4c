//! memcached: what goes over the wire is [`codec`]'s, how a socket comes about [`connect`]'s. A CGI process talks to it
//! by [`blocking`], the persistent mode by [`pipelined`].

pub mod blocking;
pub mod codec;
mod connect;
pub mod pipelined;
