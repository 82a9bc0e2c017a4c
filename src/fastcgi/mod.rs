//! The persistent mode: serves FastCGI on a listening socket, many requests at a time, on one thread.
//!
//! A web server or systemd starts the executable with the socket as fd 0, or systemd as fd 3. Each [`connection`] is a task
//! of its own, with the records that [`codec`] reads and writes; each request goes through the same [`http::answer`] as in
//! CGI, with FastCGI's parameters in the place of the environment. Settings may come from either. Requests that wait are
//! [`waiting`]'s: [`hub`] tells them what is new, out of a [`snapshot`]. [`publishers`] go one
//! after the other on a bus.

pub mod codec;
pub mod connection;
pub mod hub;
pub mod publishers;
pub mod snapshot;
pub mod waiting;

use std::cell::Cell;
use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, SockRef, Socket};
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, LocalOptions};
use tokio::select;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{spawn_local, yield_now};
use tokio::time::{sleep, timeout};

use crate::bus::store::StoreError;
use crate::bus::{self, Publish};
use crate::config::{self, Config};
use crate::http::error::Error;
use crate::http::request::{self, Gateway};
use crate::http::response::Response;
use crate::http::waiting::Waiting;
use crate::http::{self, Backend};
use crate::limits;
use crate::stores::pooled::{Address, Pooled, Stores};
use crate::stores::random_pause;
use crate::variables::{Variables, whole_number};
use codec::{Parameters, Request};
use connection::{Buffers, Connection};
use hub::Hubs;
use publishers::Publishers;
use waiting::Waiter;

/// The socket to serve, if this process was started with one: fd 0, or systemd's first, fd 3 (sd_listen_fds(3)).
///
/// That fd 0 is a socket says nothing: under mod_cgid it is the connection of one CGI request.
pub fn listener() -> Option<Socket> {
    let listening = |fd: BorrowedFd| {
        let socket = SockRef::from(&fd);
        socket.is_listener().is_ok_and(|yes| yes).then(|| socket.try_clone().ok()).flatten()
    };
    let is_ours = Variables::environment().text("LISTEN_PID") == std::process::id().to_string().as_bytes();
    listening(std::io::stdin().as_fd()).or_else(|| {
        // SAFETY: LISTEN_PID promises that fd 3 was open when this process began, and nothing closes it. If it is not open
        // after all, the calls on it fail; no file of our own has its number yet.
        is_ours.then(|| listening(unsafe { BorrowedFd::borrow_raw(3) })).flatten()
    })
}

/// Serves until a signal ends it: SIGTERM, SIGINT, SIGHUP, or SIGUSR1 as FastCGI has it (section 2.3, "close all"). What
/// is being answered then is finished, within [`limits::GRACE`].
///
/// # Errors
/// There is no runtime to be had: no file descriptors, no memory.
pub fn serve(argv0: &[u8], listener: Socket) -> io::Result<()> {
    let connections =
        limits::CONNECTIONS.min(files().saturating_sub(limits::FILES_SPARE + limits::CONNECTIONS_REFUSED)).max(1);
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    let stores = Stores::default();
    let hubs = Rc::new(Hubs::new(stores.clone()));
    // Requests that wait leave room for those that do not.
    let waiting = connections - (connections / 8).max(1);
    let server = Server {
        argv0: argv0.to_vec(),
        environment: Variables::environment(),
        publishers: Rc::new(Publishers::new(stores.clone(), hubs.clone())),
        hubs,
        stores,
        places: Arc::new(Semaphore::new(connections)),
        refusals: Arc::new(Semaphore::new(limits::CONNECTIONS_REFUSED)),
        waiting: Semaphore::new(waiting),
        buffers: Buffers::default(),
        answering: watch::Sender::new(0),
        room: Notify::new(),
        stopping: Cell::new(false),
    };
    runtime.block_on(Rc::new(server).run(listener))
}

/// How many files this process may open: as many as the system lets it, which is more than it starts with.
fn files() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    let limit = setrlimit(Resource::Nofile, raised).map_or(limit, |()| raised);
    limit.current.map_or(usize::MAX, |files| files as usize)
}

struct Server {
    argv0: Vec<u8>,
    environment: Variables<'static>,
    stores: Stores,
    hubs: Rc<Hubs>,
    publishers: Rc<Publishers>,
    /// A permit for each connection that can be served.
    places: Arc<Semaphore>,
    /// A permit for each connection beyond these that can be told so.
    refusals: Arc<Semaphore>,
    /// A permit for each request that may wait.
    waiting: Semaphore,
    /// For bodies and replies on their way.
    buffers: Buffers,
    /// How many requests have begun to arrive and are not answered yet.
    answering: watch::Sender<usize>,
    /// Notified when a connection that does nothing is to make room for another.
    room: Notify,
    /// No further request is taken.
    stopping: Cell<bool>,
}

/// What lets a connection in.
struct Admission {
    _permit: OwnedSemaphorePermit,
    /// It has none of the places, and is there to be told so.
    refused: bool,
}

impl Server {
    async fn run(self: Rc<Server>, listener: Socket) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut close_all = signal(SignalKind::user_defined1())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        // Caught and not looked at: a log that nobody reads must not end us.
        let _log_unread = signal(SignalKind::pipe())?;
        listener.set_nonblocking(true)?;
        let tcp = listener.domain().is_ok_and(|domain| domain != Domain::UNIX);
        // SAFETY: a Socket's descriptor is open and the same one until it is dropped, and this AsyncFd has it to the end.
        let listener = unsafe { AsyncFd::register(listener)? };
        select! {
            _ = terminate.recv() => {}
            _ = close_all.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
            never = self.accept(&listener, tcp) => match never {},
        }
        // Other processes may go on with the socket; the connections in its queue are not ours.
        drop(listener);
        self.stopping.set(true);
        self.hubs.wake();
        // What has arrived, but was not looked at yet, is answered still.
        sleep(limits::ACCEPT_PAUSE).await;
        let _ = timeout(limits::GRACE, self.answering.subscribe().wait_for(|&requests| requests == 0)).await;
        Ok(())
    }

    async fn accept(self: &Rc<Server>, listener: &AsyncFd<Socket>, tcp: bool) -> std::convert::Infallible {
        loop {
            let mut admission = self.admit().await;
            let accepted = match listener.readable().await {
                Ok(mut ready) => ready.try_io(|listener| listener.get_ref().accept()),
                Err(error) => Ok(Err(error)),
            };
            let stream = match accepted {
                // Another process was first.
                Err(_would_block) => continue,
                Ok(accepted) => accepted.and_then(|(socket, _)| to_stream(socket, tcp)),
            };
            match stream {
                Ok(stream) => {
                    self.find_place(&mut admission);
                    if admission.refused {
                        self.room.notify_one();
                    }
                    drop(spawn_local(self.clone().converse(stream, admission)));
                    // Without it a long queue lets no other task run.
                    yield_now().await;
                }
                // No file descriptors, no memory: some will be free again. The rest wait in the queue.
                Err(_) => sleep(limits::ACCEPT_PAUSE).await,
            }
        }
    }

    /// Waits until a connection may be accepted, be it to be refused.
    async fn admit(&self) -> Admission {
        let (permit, refused) = select! {
            biased;
            place = self.places.clone().acquire_owned() => (place, false),
            refusal = self.refusals.clone().acquire_owned() => (refusal, true),
        };
        Admission { _permit: permit.expect("the semaphores stay open"), refused }
    }

    /// Gives a refused connection a place, if there is one by now.
    fn find_place(&self, admission: &mut Admission) {
        if admission.refused
            && let Ok(permit) = self.places.clone().try_acquire_owned()
        {
            *admission = Admission { _permit: permit, refused: false };
        }
    }

    /// One connection. Whatever is wrong with it is nobody else's business.
    async fn converse(self: Rc<Server>, stream: TcpStream, mut admission: Admission) {
        let (room, crowded) = (Cell::new(None), Cell::new(false));
        // Most requests have no body, and need not have their settings read for it.
        let body_limit = |parameters: &Parameters| {
            let variables = parameters.variables();
            let length = variables.text("CONTENT_LENGTH");
            if variables.text("REQUEST_METHOD") == b"GET" && length.is_empty() {
                return 0;
            }
            let limit = self.config(&variables).map_or(0, |config| request::body_limit(&variables, &config));
            let expected =
                whole_number(length).map_or(limit, |length| limit.min(usize::try_from(length).unwrap_or(limit)));
            let reserved = self.buffers.reserve(expected);
            crowded.set(reserved.is_none());
            room.set(reserved);
            if crowded.get() { 0 } else { limit }
        };
        let mut connection = Connection::new(stream, self.buffers.clone());
        let (mut answering, mut kept) = (None, false);
        let refused = admission.refused;
        loop {
            // Between requests the web server may take its time, unless its place is wanted; a request that has begun
            // has to go on, and the first one to come.
            let idle = kept && !connection.parser.is_busy();
            let read = connection.read(&body_limit);
            let read = if refused {
                connection::timeout(limits::REFUSED_DEADLINE, read).await
            } else if idle {
                select! {
                    biased;
                    read = read => read,
                    () = self.room.notified() => return,
                }
            } else {
                connection::timeout(limits::PEER_DEADLINE, read).await
            };
            if read.is_err() {
                return;
            }
            if connection.parser.is_busy() && answering.is_none() {
                answering = Some(Answering::new(self.clone()));
            }
            let mut closing = false;
            if let Some(request) = connection.parser.split_request() {
                // A connection without a request may have made room meanwhile.
                self.find_place(&mut admission);
                closing = !request.keep || refused;
                let refused = admission.refused || crowded.take();
                if self.respond(request, refused, &mut connection).await.is_err() {
                    return;
                }
                connection.parser.answered();
                kept = true;
            }
            closing |= connection.parser.is_closing();
            if connection.flush().await.is_err() || closing {
                return;
            }
            if !connection.parser.is_busy() {
                (answering, _) = (None, room.take());
                if self.stopping.get() {
                    return;
                }
            }
        }
    }

    /// Answers one request, up to what is left to be flushed.
    async fn respond(&self, request: Request, refused: bool, connection: &mut Connection) -> io::Result<()> {
        let id = request.id;
        let head = request.parameters.variables().text("REQUEST_METHOD") == b"HEAD";
        // In boxes: what they need is given back while the connection waits for the next request.
        let mut response = Box::pin(self.answer(request, refused)).await;
        match response.waiting.take() {
            Some(waiting) => Box::pin(self.wait(id, response, waiting, connection)).await,
            None => {
                let log = response.log.as_deref().unwrap_or_default();
                codec::reply(&mut connection.out, id, &response.to_cgi(head, false), log.as_bytes());
                Ok(())
            }
        }
    }

    /// Lets a request wait, for as long as there is room for it.
    async fn wait(
        &self,
        id: u16,
        response: Response,
        waiting: Box<Waiting>,
        connection: &mut Connection,
    ) -> io::Result<()> {
        let permit = self.waiting.try_acquire();
        let at_once = Cell::new(true);
        let ending = if permit.is_ok() { &self.stopping } else { &at_once };
        let subscriber = self.hubs.subscribe(Address::of(&waiting.config), waiting.page.last_id, waiting.user);
        let ends = Instant::now() + 2 * random_pause(limits::STREAM_LIFE);
        let mut waiter = Waiter { id, connection, subscriber, ending, ends };
        http::waiting::serve(response, waiting, false, &mut waiter).await
    }

    async fn answer(&self, request: Request, refused: bool) -> Response {
        if request.parameters.too_many {
            // What names the bus may be among those that were dropped.
            return Response::error(b"", &Error::HeadersTooLarge);
        }
        let variables = request.parameters.variables();
        let config = self.config(&variables);
        if refused {
            let bus = config.as_ref().map_or_else(|error| &error.bus, |config| &config.bus);
            return Response::error(bus, &Error::Crowded);
        }
        let limit = config.as_ref().map_or(0, |config| request::body_limit(&variables, config));
        let body = request::read_body(&variables, &request.body[..], limit);
        http::answer(&variables, Gateway::FastCgi, config, body, self).await
    }

    /// The settings of one request: of its parameters, else of the environment that this process was started with.
    fn config(&self, variables: &Variables) -> Result<Config, config::Error> {
        Config::read(variables, &self.environment, &self.argv0, limits::WAIT_MAX)
    }
}

impl Backend for Server {
    type Store = Pooled;

    fn open(&self, config: &Config) -> Result<Pooled, StoreError> {
        Ok(self.stores.open(Address::of(config)))
    }

    async fn publish(&self, config: &Config, publish: Publish<'_>) -> Result<Vec<u64>, bus::Error> {
        self.publishers.publish(Address::of(config), publish, config.ttl).await
    }
}

fn to_stream(socket: Socket, tcp: bool) -> io::Result<TcpStream> {
    socket.set_nonblocking(true)?;
    if tcp {
        // A stream's messages go out at once; web servers that are slow to acknowledge cost 40 ms.
        socket.set_tcp_nodelay(true)?;
        // A connection whose host has gone does not keep its place.
        socket.set_keepalive(true)?;
    }
    TcpStream::from_std(StdTcpStream::from(OwnedFd::from(socket)))
}

/// Counts a request as being answered, until it is dropped.
struct Answering(Rc<Server>);

impl Answering {
    fn new(server: Rc<Server>) -> Answering {
        server.answering.send_modify(|requests| *requests += 1);
        Answering(server)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answering.send_modify(|requests| *requests -= 1);
    }
}
