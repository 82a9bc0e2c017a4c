//! The least that a FastCGI responder can do: reads each request, answers with an empty poll's reply. On the unix
//! socket that its argument names; reads and writes as shortbus does.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};

use shortbus::fastcgi::codec::{self as fastcgi, Parser};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

fn main() {
    let path = std::env::args_os().nth(1).expect("the path of a socket");
    let _ = std::fs::remove_file(&path);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = UnixListener::bind(&path).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::task::spawn_local(serve(stream));
        }
    });
}

async fn serve(mut stream: UnixStream) -> io::Result<()> {
    let (mut parser, mut out) = (Parser::default(), Vec::new());
    let mut more = true;
    while more {
        more = poll_fn(|context| {
            let mut buffer = [0; 4096];
            let mut buffer = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut stream).poll_read(context, &mut buffer))?;
            let wrong = parser.feed(buffer.filled(), &mut out, &|_| 0).is_err();
            Poll::Ready(io::Result::Ok(!wrong && !buffer.filled().is_empty()))
        })
        .await?;
        if let Some(request) = parser.split_request() {
            fastcgi::reply(&mut out, request.id, include_bytes!("reply.http"), b"");
            let written = poll_fn(|context| Pin::new(&mut stream).poll_write(context, &out)).await?;
            more &= written == out.len() && request.keep;
            parser.answered();
            out.clear();
        }
    }
    Ok(())
}
