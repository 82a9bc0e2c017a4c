//! The persistent mode's driver: one connection to each memcached, which all requests share.
//!
//! A request's batch is appended to what is to be sent and waits in line for its replies; the connection's task sends
//! all that has gathered in one write, so that requests which arrive together share a round trip. memcached answers in
//! order, and a batch stays in one piece.
//!
//! A request waits for no longer than in CGI, [`crate::limits::STORE_DEADLINE`]. When one has waited in vain, the
//! connection takes no further request: those that it has may go on until their time is over, and the next request gets a
//! new connection. One attempt to connect is made at a time, and shared by all requests that need it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use memcache::exp::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::select;
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::codec::{
    Parts, Responses, command, connect_error, key_prefix, replies, split_response, store_error, unexpected,
};
use super::connect::connect;
use crate::bus::name::Place;
use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::limits;
use crate::stores::{random_pause, unix_micros};

type Result<T> = std::result::Result<T, StoreError>;

/// The connections of this process, by the servers' addresses.
pub struct Pool {
    servers: RefCell<HashMap<String, Link>>,
    began: Instant,
}

impl Default for Pool {
    fn default() -> Pool {
        Pool { servers: RefCell::default(), began: Instant::now() }
    }
}

enum Link {
    /// Being made, for the requests that wait for it.
    Dialing(Vec<oneshot::Sender<Result<Rc<Pipeline>>>>),
    Open(Rc<Pipeline>),
}

impl Pool {
    /// A bus's keys in its memcached, for one request. Connects when it is used.
    pub fn open(self: &Rc<Pool>, place: &Place) -> Pipelined {
        let (server, prefix) = (place.server.clone(), key_prefix(&place.bus));
        Pipelined { pool: self.clone(), server, prefix, started: Instant::now(), pipeline: None }
    }

    async fn pipeline(self: &Rc<Pool>, server: &str) -> Result<Rc<Pipeline>> {
        let receiver = {
            let (sender, receiver) = oneshot::channel();
            let mut servers = self.servers.borrow_mut();
            match servers.get_mut(server) {
                Some(Link::Open(pipeline)) if pipeline.is_open() => return Ok(pipeline.clone()),
                Some(Link::Dialing(waiting)) => waiting.push(sender),
                _ => {
                    // Requests may name any server: those that nobody waits for make room.
                    if servers.len() >= limits::SERVERS {
                        servers.retain(|_, link| !matches!(link, Link::Open(pipeline) if pipeline.retire_idle()));
                    }
                    servers.insert(server.into(), Link::Dialing(vec![sender]));
                    spawn_local(self.clone().dial(server.into()));
                }
            }
            receiver
        };
        receiver.await.unwrap_or_else(|_| Err(StoreError::Unreachable(server.into())))
    }

    async fn dial(self: Rc<Pool>, server: String) {
        let result = dial(&server).await.map(|stream| {
            let pipeline = Rc::new(Pipeline::default());
            spawn_local(pipeline.clone().drive(stream, server.clone()));
            pipeline
        });
        let mut servers = self.servers.borrow_mut();
        let link = match &result {
            Ok(pipeline) => servers.insert(server, Link::Open(pipeline.clone())),
            Err(_) => servers.remove(&server),
        };
        if let Some(Link::Dialing(waiting)) = link {
            waiting.into_iter().for_each(|sender| drop(sender.send(result.clone())));
        }
    }
}

/// Connects on a thread of its own: looking a name up blocks, and so does a unix socket whose queue is full.
async fn dial(server: &str) -> Result<TcpStream> {
    let (sender, receiver) = oneshot::channel();
    let name = server.to_owned();
    let connected = async {
        thread::Builder::new().spawn(move || sender.send(connect(&name, Instant::now())))?;
        let socket = receiver.await.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))?;
        socket.set_nonblocking(true)?;
        TcpStream::from_std(socket)
    };
    connected.await.map_err(|error| connect_error(server, error))
}

/// A connection and all that goes through it.
#[derive(Default)]
struct Pipeline {
    state: RefCell<State>,
    /// The connection's task has something to do.
    wake: Notify,
}

#[derive(Default)]
struct State {
    /// What is to be sent.
    out: Vec<u8>,
    /// The batches whose replies are still to come, in order.
    waiting: VecDeque<Waiting>,
    /// When to look next for batches that have waited too long: not after any of them has.
    alarm: Option<Instant>,
    reset_alarm: bool,
    /// Requests whose connection it is.
    users: usize,
    /// It takes no further request, and closes after the last one.
    retired: bool,
    /// It is closed, by this.
    closed: Option<StoreError>,
}

struct Waiting {
    /// None once it has been told.
    sender: Option<oneshot::Sender<Result<Vec<Parts>>>>,
    /// When it has waited too long.
    deadline: Instant,
    responses: Responses,
}

impl Pipeline {
    fn is_open(&self) -> bool {
        !self.state.borrow().retired
    }

    /// Takes no further request, and closes when those that it has are through.
    fn retire(&self) {
        self.state.borrow_mut().retired = true;
        self.wake.notify_one();
    }

    fn retire_idle(&self) -> bool {
        let idle = self.state.borrow().users == 0;
        if idle {
            self.retire();
        }
        idle
    }

    fn send(
        &self,
        prefix: &str,
        batch: &[Op<'_>],
        deadline: Instant,
        server: &str,
    ) -> Result<oneshot::Receiver<Result<Vec<Parts>>>> {
        let state = &mut *self.state.borrow_mut();
        if let Some(error) = &state.closed {
            // On another, tokens that were read on this one say nothing: memcached may have restarted.
            return Err(error.clone());
        }
        let before = state.out.len();
        for op in batch {
            if let Err(error) = command(prefix, op).encode_into(&mut state.out) {
                // Half a batch would give all who come later others' replies.
                state.out.truncate(before);
                return Err(store_error(server, error));
            }
        }
        let (sender, receiver) = oneshot::channel();
        let responses = Responses::new(batch.len());
        state.waiting.push_back(Waiting { sender: Some(sender), deadline, responses });
        // Seldom: one alarm does for all that comes before it rings. A timer for each would cost as much as a read.
        state.reset_alarm |= state.alarm.is_none_or(|alarm| deadline < alarm);
        self.wake.notify_one();
        Ok(receiver)
    }

    /// The connection's task. Ends when the connection fails, or is retired and nobody waits.
    async fn drive(self: Rc<Pipeline>, stream: TcpStream, server: String) {
        let error = self.exchange(stream, &server).await;
        let mut state = self.state.borrow_mut();
        (state.retired, state.closed) = (true, Some(error.clone()));
        for sender in state.waiting.drain(..).filter_map(|waiting| waiting.sender) {
            let _ = sender.send(Err(error.clone()));
        }
    }

    /// Sends and receives: what ended the connection.
    async fn exchange(&self, mut stream: TcpStream, server: &str) -> StoreError {
        let failed = |error| store_error(server, Error::Io(error));
        let (mut reader, mut writer) = stream.split();
        let (mut output, mut input, mut buffer) = (Vec::new(), Vec::new(), [0; BUFFER]);
        let mut alarm = pin!(sleep(limits::STORE_DEADLINE));
        let mut unsent = None;
        loop {
            let armed = {
                let state = &mut *self.state.borrow_mut();
                if output.is_empty() {
                    std::mem::swap(&mut output, &mut state.out);
                }
                if state.reset_alarm {
                    state.time_out(server);
                    state.alarm.iter().for_each(|next| alarm.as_mut().reset((*next).into()));
                }
                if state.retired && state.users == 0 {
                    return unexpected(server);
                }
                state.alarm.is_some()
            };
            select! {
                biased;
                written = writer.write(&output), if !output.is_empty() && unsent.is_none() => match written {
                    Ok(written) => drop(output.drain(..written)),
                    // A memcached that closed may have said why: what it sent is read first.
                    Err(error) => {
                        unsent = Some(failed(error));
                        self.retire();
                    }
                },
                read = reader.read(&mut buffer) => {
                    let received = match read {
                        Ok(0) => Err(unsent.take().unwrap_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))),
                        Ok(read) => {
                            input.extend_from_slice(&buffer[..read]);
                            self.state.borrow_mut().receive(&mut input, server)
                        }
                        Err(error) => Err(failed(error)),
                    };
                    if let Err(error) = received {
                        return error;
                    }
                },
                () = alarm.as_mut(), if armed => self.state.borrow_mut().reset_alarm = true,
                () = self.wake.notified() => {}
            }
        }
    }
}

impl State {
    /// Tells the requests that have waited too long, and sets the alarm for the next one.
    fn time_out(&mut self, server: &str) {
        let now = Instant::now();
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.deadline <= now) {
            if let Some(sender) = waiting.sender.take() {
                let _ = sender.send(Err(store_error(server, Error::Io(io::ErrorKind::TimedOut.into()))));
                self.retired = true;
            }
        }
        self.alarm =
            self.waiting.iter().filter(|waiting| waiting.sender.is_some()).map(|waiting| waiting.deadline).min();
        self.reset_alarm = false;
    }

    /// Hands out the responses that are complete.
    fn receive(&mut self, input: &mut Vec<u8>, server: &str) -> Result<()> {
        let mut rest = &input[..];
        while let Some(response) = split_response(&mut rest).transpose() {
            let response = response.map_err(|error| store_error(server, error));
            let Some(waiting) = self.waiting.front_mut() else {
                // Not asked yet, a memcached may have refused the connection.
                return Err(response.err().unwrap_or_else(|| unexpected(server)));
            };
            waiting.responses.push(response)?;
            if waiting.responses.are_complete()
                && let Some(waiting) = self.waiting.pop_front()
            {
                let _ = waiting.sender.map(|sender| sender.send(waiting.responses.into_result()));
            }
        }
        let taken = input.len() - rest.len();
        input.drain(..taken);
        if input.is_empty() && input.capacity() > limits::REPLY_BYTES {
            *input = Vec::new();
        }
        Ok(())
    }
}

/// Bytes read at a time: most polls' replies.
const BUFFER: usize = 8192;

/// A bus's keys, for one request.
pub struct Pipelined {
    pool: Rc<Pool>,
    server: String,
    prefix: String,
    started: Instant,
    /// The connection of this request, from its first batch on.
    pipeline: Option<Rc<Pipeline>>,
}

impl Pipelined {
    /// Whether its connection still takes requests.
    pub fn is_open(&self) -> bool {
        self.pipeline.as_ref().is_some_and(|pipeline| pipeline.is_open())
    }

    /// Begins the time of another request.
    pub fn renew(&mut self) {
        self.started = Instant::now();
    }

    async fn exchange(&mut self, batch: &[Op<'_>]) -> Result<Vec<Parts>> {
        let pipeline = match &self.pipeline {
            Some(pipeline) => pipeline,
            None => {
                let pipeline = self.pool.pipeline(&self.server).await?;
                pipeline.state.borrow_mut().users += 1;
                self.pipeline.insert(pipeline)
            }
        };
        let deadline = self.started + limits::STORE_DEADLINE;
        if deadline <= Instant::now() {
            return Err(StoreError::Late(self.server.clone()));
        }
        let receiver = pipeline.send(&self.prefix, batch, deadline, &self.server)?;
        receiver.await.unwrap_or_else(|_| Err(unexpected(&self.server)))
    }
}

impl Drop for Pipelined {
    fn drop(&mut self) {
        if let Some(pipeline) = &self.pipeline {
            let mut state = pipeline.state.borrow_mut();
            state.users -= 1;
            if state.retired {
                pipeline.wake.notify_one();
            }
        }
    }
}

impl Store for Pipelined {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>> {
        let responses = self.exchange(batch).await?;
        // What is there may be no memcached: nobody else is to rely on the connection.
        replies(&self.server, batch, responses)
            .inspect_err(|_| self.pipeline.iter().for_each(|pipeline| pipeline.retire()))
    }

    /// Most polls find nothing new, and another round trip on an open connection is cheap.
    fn ahead(&self) -> u64 {
        0
    }

    async fn pause(&mut self, longest: Duration) {
        sleep(random_pause(longest)).await;
    }

    /// The same for all requests: what one read another may go by.
    fn now(&self) -> Duration {
        self.pool.began.elapsed()
    }

    fn unix_micros(&self) -> u64 {
        unix_micros()
    }
}
