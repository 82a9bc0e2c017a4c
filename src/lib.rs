//! shortbus: a broadcasting message bus for browser pages, in one executable, for CGI and FastCGI.
//!
//! `main` picks a front:
//! - [`cgi`]: the web server starts a process for each request;
//! - [`fastcgi`]: a process stays, and serves many requests from a socket, on tokio;
//! - [`cli`]: a person at a terminal.
//!
//! Below the fronts:
//! - [`http`]: what a request means, whichever front brought it: routes, parameters, origins, responses;
//! - [`bus`]: the heart, the delivery protocol: join, publish, poll, over the operations of [`bus::store`];
//! - [`stores`]: where messages live, each store one that carries out these operations; and [`stores::decision`], which of
//!   them a bus lives in where no setting says it;
//! - [`browser`]: the client and the page that the bus serves;
//! - [`config`]: the settings; [`variables`]: names and values as web servers give them; [`limits`]: every bound;
//!   [`hash`]: shortens long names, and tags files.
//!
//! A poll under CGI: `main` calls [`cgi::serve`], which reads the settings and the body; [`http::answer`] reads the
//! request's line ([`http::request`]) and calls [`bus::poll`], which runs its batches in a store
//! ([`stores::memcached::blocking`] or [`stores::local`]) and gives back a [`bus::Page`]; [`http::response`] makes JSON of it, and `cgi` writes it
//! at once. A publish goes the same way, by [`http::message`], which checks the value, [`http::signature`] on a signed bus,
//! and [`bus::publish`]. A stream under FastCGI takes the same way through [`http`], then waits in [`http::waiting`], where
//! [`fastcgi::hub`] tells it what is new, and [`http::event_stream`] has the words for it.

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
pub mod variables;
