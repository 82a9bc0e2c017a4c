//! shortbus: a broadcasting message bus for browser pages, in one executable, for CGI and FastCGI.
//!
//! A web server starts the executable for each request, or once, as a FastCGI server that stays. Follow a request
//! through the house:
//! - `main` chooses: a request, a socket to serve, or a person at a terminal ([`cli`]);
//! - [`cgi`] takes the request from the environment and stdin, and writes the response to stdout, at once;
//! - [`server`] takes many from a socket, on tokio, each [`connection`] with the records that [`fastcgi`] reads and
//!   writes;
//! - [`config`] reads the settings, [`http`] checks the request and routes it;
//! - [`files`] are the browser client and the page;
//! - [`message`] checks what is published, [`signature`] by whom;
//! - [`bus`] is the delivery protocol, the heart of it: join, publish, poll, over the operations of [`store`];
//! - [`memcached`] carries them out, each batch in one write; [`pipeline`] for many requests on one connection;
//! - [`held`] are the requests that wait for messages, [`hub`] tells them that there are some, [`watch`] finds what is
//!   new for all of them at once, and [`event_stream`] puts it into the words that browsers expect;
//! - [`turns`] lines up those who publish at the same time;
//! - [`hash`] shortens long names for memcached, and tags the files;
//! - [`error`] turns whatever fails into a status, a code and a sentence; [`limits`] holds every bound.

#![warn(missing_docs)]

pub mod browser;
pub mod bus;
pub mod cgi;
pub mod cli;
pub mod config;
pub mod fastcgi;
pub mod hash;
pub mod http;
pub mod limits;
pub mod stores;
