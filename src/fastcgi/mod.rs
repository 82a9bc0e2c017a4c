//! The persistent mode: serves FastCGI on a listening socket, many requests at a time, on one thread.
//!
//! A web server or systemd starts the executable with the socket as fd 0, or systemd as fd 3. Each connection is a task
//! of its own ([`crate::fastcgi::connection`], [`crate::fastcgi::waiting`]); each request goes through the same [`http::answer`] as in CGI, with
//! FastCGI's parameters in the place of the environment. Settings may come from either.

pub mod codec;
pub mod connection;
pub mod hub;
pub mod publishers;
pub mod snapshot;
pub mod waiting;

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::task::Poll;

use socket2::{Domain, SockRef, Socket};
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{spawn_local, yield_now};
use tokio::time::{sleep, timeout};

use crate::cgi::variable;
use crate::config::Config;
use crate::fastcgi::codec::{Parameters, Request};
use crate::fastcgi::connection::{Connection, within};
use crate::fastcgi::publishers::Turns;
use crate::http::error::Error;
use crate::http::{self, Response};
use crate::limits;
use crate::stores::memcached::blocking::home;
use crate::stores::memcached::pipelined::Pool;
use hub::Hubs;

/// The socket to serve, if this process was started with one: fd 0, or systemd's first, fd 3 (sd_listen_fds(3)).
///
/// That fd 0 is a socket says nothing: under mod_cgid it is the connection of one CGI request.
pub fn listener() -> Option<Socket> {
    let listening = |fd: BorrowedFd| {
        let socket = SockRef::from(&fd);
        socket.is_listener().is_ok_and(|yes| yes).then(|| socket.try_clone().ok()).flatten()
    };
    let is_ours = variable("LISTEN_PID").is_some_and(|pid| pid == std::process::id().to_string().as_bytes());
    listening(std::io::stdin().as_fd()).or_else(|| {
        // SAFETY: if fd 3 is not open, the one system call on it says so.
        is_ours.then(|| listening(unsafe { BorrowedFd::borrow_raw(3) })).flatten()
    })
}

/// Serves until a signal ends it: SIGTERM, or SIGUSR1 as FastCGI has it (section 2.3, "close all"), or SIGINT. What
/// is being answered then is finished, within [`limits::GRACE`].
///
/// # Errors
/// There is no runtime to be had: no file descriptors, no memory.
pub fn serve(argv0: &[u8], listener: Socket) -> io::Result<()> {
    // SAFETY: no thread runs yet, and no handler is set that could run. A log that nobody reads must not end us.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let connections =
        limits::CONNECTIONS.min(files().saturating_sub(limits::FILES_SPARE + limits::CONNECTIONS_REFUSED)).max(1);
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let pool = Rc::<Pool>::default();
    let server = Server {
        argv0: argv0.to_vec(),
        hubs: Rc::new(Hubs::new(pool.clone())),
        turns: Rc::default(),
        pool,
        held: Cell::new(0),
        connections,
        open: Cell::new(0),
        answering: Cell::new(0),
        fewer: Notify::new(),
        room: Notify::new(),
        stopping: Cell::new(false),
    };
    runtime.block_on(Rc::new(server).run(listener))
}

/// How many files this process may open: as many as the system lets it, which is more than it starts with.
fn files() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write the one structure they are given.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return 0;
        }
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raised) == 0 {
            limit = raised;
        }
    }
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

struct Server {
    argv0: Vec<u8>,
    pool: Rc<Pool>,
    /// How many connections are served.
    connections: usize,
    /// How many there are.
    open: Cell<usize>,
    /// How many requests have begun to arrive and are not answered yet.
    answering: Cell<usize>,
    /// How many of them are held.
    held: Cell<usize>,
    hubs: Rc<Hubs>,
    turns: Rc<Turns>,
    /// Told when either has gone down.
    fewer: Notify,
    /// Told when a connection that does nothing is to make room for another.
    room: Notify,
    /// No further request is taken.
    stopping: Cell<bool>,
}

impl Server {
    async fn run(self: Rc<Server>, listener: Socket) -> io::Result<()> {
        let signals = [SignalKind::terminate(), SignalKind::user_defined1(), SignalKind::interrupt()];
        let mut signals = signals.map(signal).into_iter().collect::<io::Result<Vec<Signal>>>()?;
        listener.set_nonblocking(true)?;
        let tcp = listener.domain().is_ok_and(|domain| domain != Domain::UNIX);
        // SAFETY: a socket has the one file descriptor that it owns for as long as it lives.
        let listener = unsafe { AsyncFd::register(listener)? };
        {
            let mut accept = std::pin::pin!(self.accept(&listener, tcp));
            poll_fn(|context| {
                let ended = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
                if ended { Poll::Ready(()) } else { accept.as_mut().poll(context).map(|never| match never {}) }
            })
            .await;
        }
        // Others may go on with the socket; those who wait in its queue are not ours.
        drop(listener);
        self.stopping.set(true);
        self.hubs.wake();
        // What has arrived, but was not looked at yet, is answered still.
        sleep(limits::ACCEPT_PAUSE).await;
        let _ = timeout(limits::GRACE, async {
            while self.answering.get() > 0 {
                self.fewer.notified().await;
            }
        })
        .await;
        Ok(())
    }

    async fn accept(self: &Rc<Server>, listener: &AsyncFd<Socket>, tcp: bool) -> std::convert::Infallible {
        loop {
            let accepted = match listener.readable().await {
                Ok(mut ready) => ready.try_io(|listener| listener.get_ref().accept()),
                Err(error) => Ok(Err(error)),
            };
            let stream = match accepted {
                // Another process was first.
                Err(_would_block) => continue,
                Ok(accepted) => accepted.and_then(|(socket, _)| {
                    socket.set_nonblocking(true)?;
                    if tcp {
                        // A stream's messages go out at once; web servers that are slow to acknowledge cost 40 ms.
                        socket.set_tcp_nodelay(true)?;
                        // One whose host has gone does not keep its place.
                        socket.set_keepalive(true)?;
                    }
                    TcpStream::from_std(StdTcpStream::from(OwnedFd::from(socket)))
                }),
            };
            match stream {
                Ok(stream) => {
                    // Counted here: its task may run only after many more were accepted.
                    let open = Counted::new(self.clone(), |server| &server.open);
                    let beyond = self.open.get() > self.connections;
                    if beyond {
                        self.room.notify_one();
                    }
                    drop(spawn_local(self.clone().converse(stream, open, beyond)));
                    // Else a long queue lets nobody else run.
                    yield_now().await;
                }
                // No file descriptors, no memory: some will be free again. The rest wait in the queue.
                Err(_) => sleep(limits::ACCEPT_PAUSE).await,
            }
            while self.open.get() >= self.connections + limits::CONNECTIONS_REFUSED {
                self.fewer.notified().await;
            }
        }
    }

    /// One connection. Whatever is wrong with it is nobody else's business.
    async fn converse(self: Rc<Server>, stream: TcpStream, _open: Counted, beyond: bool) {
        // Most requests have no body, and need not have their settings read for it.
        let body_limit =
            |parameters: &Parameters| match (parameters.get("REQUEST_METHOD"), parameters.get("CONTENT_LENGTH")) {
                (Some(b"GET"), None | Some(b"")) => 0,
                _ => self.config(parameters).map_or(0, |config| config.max_bytes),
            };
        let mut connection = Connection::new(stream);
        let (mut answering, mut kept) = (None, false);
        loop {
            // Between requests the web server may take its time, unless its place is wanted; a request that has begun
            // has to go on, and the first one to come.
            let read = match (beyond, connection.parser.is_busy() || !kept) {
                (false, false) => unless(self.room.notified(), connection.read(&body_limit)).await,
                (false, true) => within(limits::PEER_DEADLINE, connection.read(&body_limit)).await,
                (true, _) => within(limits::BEYOND_DEADLINE, connection.read(&body_limit)).await,
            };
            if read.is_err() {
                return;
            }
            if connection.parser.is_busy() && answering.is_none() {
                answering = Some(Counted::new(self.clone(), |server| &server.answering));
            }
            let mut closing = false;
            if let Some(request) = connection.parser.take_request() {
                let id = request.id;
                // One without a request may have made room meanwhile.
                let crowded = beyond && self.open.get() > self.connections;
                closing = !request.keep || beyond;
                // In boxes: what they need is given back while the connection waits for the next request.
                let head = request.parameters.get("REQUEST_METHOD") == Some(b"HEAD");
                let response = Box::pin(self.answer(request, crowded)).await;
                if response.held.is_none() {
                    let log = response.log.as_deref().unwrap_or_default();
                    codec::reply(&mut connection.out, id, &response.to_cgi(head, false), log.as_bytes());
                } else {
                    // Who waits has to leave room for those who do not: where there is none, nobody waits for long.
                    let full = Cell::new(true);
                    let is_full = self.held.get() + (self.connections / 8).max(1) >= self.connections;
                    let ends = if is_full { &full } else { &self.stopping };
                    let _held = Counted::new(self.clone(), |server| &server.held);
                    if Box::pin(waiting::hold(id, response, &mut connection, &self.hubs, ends)).await.is_err() {
                        return;
                    }
                }
                connection.parser.answered();
                kept = true;
            }
            closing |= connection.parser.is_closing();
            if connection.flush().await.is_err() || closing {
                return;
            }
            if !connection.parser.is_busy() {
                answering = None;
                if self.stopping.get() {
                    return;
                }
            }
        }
    }

    async fn answer(&self, request: Request, crowded: bool) -> Response {
        let parameters = &request.parameters;
        if parameters.too_many || crowded {
            return http::refuse(if crowded { &Error::Crowded } else { &Error::Parameters });
        }
        let vars = |name: &str| parameters.get(name).map(<[u8]>::to_vec);
        let config = self.config(parameters);
        let limit = config.as_ref().map_or(0, |config| config.max_bytes);
        let body = http::read_body(&vars, &request.body[..], limit);
        let publishes = parameters.get("REQUEST_METHOD") == Some(b"POST");
        let place = |config: &Config| hub::key(home(&config.memcached, &config.bus), &config.bus);
        let place = config.as_ref().ok().filter(|_| publishes).map(place);
        let _turn = match &place {
            Some(place) => Some(self.turns.take(place.clone()).await),
            None => None,
        };
        let open = |config: &Config| Ok(self.pool.open(&config.memcached, &config.bus));
        let response = http::answer(&vars, config, body, open).await;
        if let Some(place) = place.filter(|_| response.is_ok()) {
            self.hubs.published(&place);
        }
        response
    }

    /// The settings of one request: of its parameters, else of the environment that this process was started with.
    fn config(&self, parameters: &Parameters) -> Result<Config, Error> {
        let vars = |name: &str| parameters.get(name).map(<[u8]>::to_vec).or_else(|| variable(name));
        Config::read(&vars, &self.argv0, limits::WAIT_MAX)
    }
}

/// Reads, but for when `end` comes first.
async fn unless(end: impl Future<Output = ()>, read: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    let (mut end, mut read) = (std::pin::pin!(end), std::pin::pin!(read));
    poll_fn(|context| match read.as_mut().poll(context) {
        Poll::Pending => end.as_mut().poll(context).map(|()| Err(io::ErrorKind::ConnectionAborted.into())),
        ready => ready,
    })
    .await
}

/// One of those that are counted, until it is dropped.
struct Counted {
    server: Rc<Server>,
    counter: fn(&Server) -> &Cell<usize>,
}

impl Counted {
    fn new(server: Rc<Server>, counter: fn(&Server) -> &Cell<usize>) -> Counted {
        counter(&server).set(counter(&server).get() + 1);
        Counted { server, counter }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let counter = (self.counter)(&self.server);
        counter.set(counter.get() - 1);
        self.server.fewer.notify_one();
    }
}
