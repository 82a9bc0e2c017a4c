//! The persistent mode's driver: one connection to each memcached, which all requests share.
//!
//! A request's batch is appended to what is to be sent and waits in line for its replies; the connection's task sends
//! all that has gathered in one write, so that requests which arrive together share a round trip. memcached answers in
//! order, and a batch stays in one piece.
//!
//! A request waits for no longer than in CGI, [`crate::limits::STORE_DEADLINE`]. When one has waited in vain, the
//! connection takes no further request: those that it has may go on until their time is over, and whoever comes next
//! gets a new connection. One attempt to connect is made at a time, and shared by all who need it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::net::TcpStream as StdTcpStream;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use memcache::exp::{Error, MetaResponse, ReturnCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::sleep;

use crate::bus::store::{Op, Reply, Store, StoreError};
use crate::config::whole_number;
use crate::limits;
use crate::stores::memcached::blocking::{
    at, cas, command, connect, home, key_prefix, random_pause, reply, unexpected, unix_micros,
};

type Result<T> = std::result::Result<T, StoreError>;

/// The connections of this process, by the servers' addresses.
#[derive(Default)]
pub struct Pool {
    servers: RefCell<HashMap<String, Link>>,
}

enum Link {
    /// Being made, for those who wait for it.
    Dialing(Vec<oneshot::Sender<Result<Rc<Pipeline>>>>),
    Open(Rc<Pipeline>),
}

impl Pool {
    /// A bus's keys in the one of `servers` that it lives on, for one request. Connects when it is used.
    pub fn open(self: &Rc<Pool>, servers: &[String], bus: &[u8]) -> Pipelined {
        let server = home(servers, bus).to_owned();
        Pipelined { pool: self.clone(), server, prefix: key_prefix(bus), started: Instant::now(), pipeline: None }
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
        // As in the blocking driver: to read and write, a connected unix socket is the same.
        TcpStream::from_std(StdTcpStream::from(OwnedFd::from(socket)))
    };
    connected.await.map_err(|error| at(server, Error::Io(error)))
}

/// A connection and all that goes through it.
#[derive(Default)]
struct Pipeline {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// What is to be sent.
    out: Vec<u8>,
    /// The batches whose replies are still to come, in order.
    waiting: VecDeque<Waiting>,
    /// When to look next for those who have waited too long: not after any of them has.
    alarm: Option<Instant>,
    reset_alarm: bool,
    /// Requests whose connection it is.
    users: usize,
    /// It takes no further request, and closes after the last one.
    retired: bool,
    /// It is closed.
    closed: bool,
    driver: Option<Waker>,
}

/// A response: return code, CAS token, value.
type Parts = (ReturnCode, Option<u64>, Option<Vec<u8>>);

struct Waiting {
    /// None once it has been told.
    sender: Option<oneshot::Sender<Result<Vec<Parts>>>>,
    /// When it has waited too long.
    deadline: Instant,
    /// Replies still to come.
    missing: usize,
    result: Result<Vec<Parts>>,
}

impl Pipeline {
    fn is_open(&self) -> bool {
        !self.state.borrow().retired
    }

    /// Takes no further request, and closes when those that it has are through.
    fn retire(&self) {
        let mut state = self.state.borrow_mut();
        state.retired = true;
        state.wake();
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
        if state.closed {
            // On another, tokens that were read on this one say nothing: memcached may have restarted.
            return Err(at(server, Error::Io(io::ErrorKind::ConnectionReset.into())));
        }
        let before = state.out.len();
        for op in batch {
            if let Err(error) = command(prefix, op).encode_into(&mut state.out) {
                // Half a batch would give all who come later others' replies.
                state.out.truncate(before);
                return Err(at(server, error));
            }
        }
        let (sender, receiver) = oneshot::channel();
        let result = Ok(Vec::with_capacity(batch.len()));
        state.waiting.push_back(Waiting { sender: Some(sender), deadline, missing: batch.len(), result });
        // Seldom: one alarm does for all that comes before it rings. A timer for each would cost as much as a read.
        state.reset_alarm |= state.alarm.is_none_or(|alarm| deadline < alarm);
        state.wake();
        Ok(receiver)
    }

    /// The connection's task. Ends when it fails, or is retired and nobody waits.
    async fn drive(self: Rc<Pipeline>, mut stream: TcpStream, server: String) {
        let mut input = Vec::new();
        let mut alarm = pin!(sleep(limits::STORE_DEADLINE));
        let error = poll_fn(|context| {
            let mut state = self.state.borrow_mut();
            if let Poll::Ready(error) = state.poll(&mut stream, &mut input, &server, context) {
                return Poll::Ready(error);
            }
            while state.alarm.is_some() && alarm.as_mut().poll(context).is_ready() || state.reset_alarm {
                state.give_up(&server);
                state.alarm.iter().for_each(|next| alarm.as_mut().reset((*next).into()));
            }
            if state.retired && state.users == 0 {
                return Poll::Ready(unexpected(&server));
            }
            state.driver = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        let mut state = self.state.borrow_mut();
        (state.retired, state.closed) = (true, true);
        for sender in state.waiting.drain(..).filter_map(|waiting| waiting.sender) {
            let _ = sender.send(Err(error.clone()));
        }
    }
}

impl State {
    /// Sends and receives as far as it goes; ready with what ended the connection.
    fn poll(
        &mut self,
        stream: &mut TcpStream,
        input: &mut Vec<u8>,
        server: &str,
        context: &mut Context,
    ) -> Poll<StoreError> {
        let failed = |error| at(server, Error::Io(error));
        while !self.out.is_empty() {
            match Pin::new(&mut *stream).poll_write(context, &self.out) {
                Poll::Ready(Ok(written)) => drop(self.out.drain(..written)),
                Poll::Ready(Err(error)) => return Poll::Ready(failed(error)),
                Poll::Pending => break,
            }
        }
        loop {
            let mut buffer = [0; BUFFER];
            let mut buffer = ReadBuf::new(&mut buffer);
            match Pin::new(&mut *stream).poll_read(context, &mut buffer) {
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                    return Poll::Ready(failed(io::ErrorKind::UnexpectedEof.into()));
                }
                Poll::Ready(Ok(())) => input.extend_from_slice(buffer.filled()),
                Poll::Ready(Err(error)) => return Poll::Ready(failed(error)),
                Poll::Pending => return Poll::Pending,
            }
            if let Err(error) = self.receive(input, server) {
                return Poll::Ready(error);
            }
        }
    }

    /// Tells those who have waited too long, and sets the alarm for the next one.
    fn give_up(&mut self, server: &str) {
        let now = Instant::now();
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.deadline <= now) {
            if let Some(sender) = waiting.sender.take() {
                let _ = sender.send(Err(at(server, Error::Io(io::ErrorKind::TimedOut.into()))));
                self.retired = true;
            }
        }
        self.alarm =
            self.waiting.iter().filter(|waiting| waiting.sender.is_some()).map(|waiting| waiting.deadline).min();
        self.reset_alarm = false;
    }

    fn wake(&mut self) {
        self.driver.take().map(Waker::wake).unwrap_or_default();
    }

    /// Hands out the responses that are complete.
    fn receive(&mut self, input: &mut Vec<u8>, server: &str) -> Result<()> {
        let mut rest = &input[..];
        while let Some(response) = response(&mut rest).transpose() {
            let Some(waiting) = self.waiting.front_mut() else {
                return Err(unexpected(server));
            };
            match response.map_err(|error| at(server, error)) {
                Ok(parts) => drop(waiting.result.as_mut().map(|all| all.push(parts))),
                // It refused one operation and goes on with the next; after other errors nobody knows what is whose.
                Err(error @ StoreError::Full(_)) => waiting.result = Err(error),
                Err(error) => return Err(error),
            }
            waiting.missing -= 1;
            if waiting.missing == 0
                && let Some(waiting) = self.waiting.pop_front()
            {
                let _ = waiting.sender.map(|sender| sender.send(waiting.result));
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

/// Takes one response off the front, where it is complete.
fn response(input: &mut &[u8]) -> std::result::Result<Option<Parts>, Error> {
    let Some(end) = input.iter().position(|&byte| byte == b'\n') else {
        return match input.len() {
            ..=LINE_MAX => Ok(None),
            _ => Err(Error::Protocol("a line without an end".into())),
        };
    };
    let line = input[..end].strip_suffix(b"\r").unwrap_or(&input[..end]);
    let header = MetaResponse::parse_header(line)?;
    let mut rest = &input[end + 1..];
    let mut value = None;
    if header.rc() == ReturnCode::Va {
        // Checked just now, but not told.
        let length = line.split(|&byte| byte == b' ').filter(|token| !token.is_empty()).nth(1).and_then(whole_number);
        let length = length.unwrap_or_default() as usize;
        let Some((data, after)) = rest.split_at_checked(length + 2) else {
            return Ok(None);
        };
        let Some(data) = data.strip_suffix(b"\r\n") else {
            return Err(Error::Protocol("a value of another length".into()));
        };
        value = Some(data.to_vec());
        rest = after;
    }
    *input = rest;
    Ok(Some((header.rc(), cas(&header), value)))
}

/// Bytes read at a time: most polls' replies.
const BUFFER: usize = 8192;

/// Longest line of a response. memcached's own end below 2,048.
const LINE_MAX: usize = 4096;

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
                state.wake();
            }
        }
    }
}

impl Store for Pipelined {
    async fn run(&mut self, batch: &[Op<'_>]) -> Result<Vec<Reply>> {
        let parts = self.exchange(batch).await?;
        let replies = batch.iter().zip(parts).map(|(op, parts)| reply(op, parts));
        replies.collect::<Option<_>>().ok_or_else(|| {
            self.pipeline.iter().for_each(|pipeline| pipeline.retire());
            unexpected(&self.server)
        })
    }

    /// Most polls find nothing new, and another round trip on an open connection is cheap.
    fn ahead(&self) -> u64 {
        0
    }

    async fn pause(&mut self, longest: Duration) {
        sleep(random_pause(longest)).await;
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn unix_micros(&self) -> u64 {
        unix_micros()
    }
}
