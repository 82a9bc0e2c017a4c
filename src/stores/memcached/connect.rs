//! Connecting to memcached, bounded in time.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::limits;

/// What is left of [`limits::STORE_DEADLINE`].
pub fn left(started: Instant) -> Duration {
    limits::STORE_DEADLINE.saturating_sub(started.elapsed())
}

/// Connects, looking the name up first where it is one. SO_SNDTIMEO bounds connect(2) for both kinds of socket;
/// without it a memcached that accepts no more holds every request that comes to a unix socket for ever.
///
/// A socket of std's, which raises no SIGPIPE where memcached has closed: socket2's would end the process. To read,
/// write and time-outs a connected unix socket is the same as TCP.
pub fn connect(server: &str, started: Instant) -> io::Result<TcpStream> {
    if server.starts_with('/') {
        return dial(Domain::UNIX, &SockAddr::unix(server)?, left(started));
    }
    let addresses = match server.parse() {
        Ok(address) => vec![address],
        Err(_) => resolve(server, left(started))?,
    };
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for (address, more) in addresses.iter().zip((1..=addresses.len() as u32).rev()) {
        result = dial(Domain::for_address(*address), &SockAddr::from(*address), left(started) / more);
        if let Ok(socket) = &result {
            // Without it the end of a large message waits for a delayed acknowledgement, 40 ms.
            socket.set_nodelay(true)?;
            break;
        }
    }
    result
}

/// Looks a host name up. On a thread, the only way to bound the resolver: it would wait ten seconds and more for a
/// silent name server. Nobody waits for the thread; it ends with the process.
fn resolve(server: &str, timeout: Duration) -> io::Result<Vec<SocketAddr>> {
    let (sender, receiver) = mpsc::channel();
    let name = server.to_owned();
    std::thread::Builder::new().spawn(move || sender.send(name.to_socket_addrs().map(Iterator::collect)))?;
    let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "host name lookup timed out"));
    receiver.recv_timeout(timeout).unwrap_or_else(late)
}

fn dial(domain: Domain, address: &SockAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    // Zero would mean "for ever".
    socket.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
    socket.connect(address).map_err(|error| match error.raw_os_error() {
        // What connect(2) answers when SO_SNDTIMEO has passed, for TCP and for unix sockets.
        Some(EINPROGRESS | EAGAIN) => io::Error::new(io::ErrorKind::TimedOut, "connect timed out"),
        _ => error,
    })?;
    Ok(OwnedFd::from(socket).into())
}

const EAGAIN: i32 = 11;
const EINPROGRESS: i32 = 115;
