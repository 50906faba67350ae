//! Taking connections: the handshake here, so that who is turned away can be said.

use crate::access::{Peer, Refusals, Shown};
use crate::certificate;
use rustls::ServerConfig;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// For a handshake: who stays silent does not keep a place.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// After accepting failed, as it does when there are no more file descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that the server has not taken over yet.
const WAITING: usize = 64;

/// A connection that was let in; its place is free again when it is dropped.
pub(crate) struct Connection {
    stream: Stream,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What accepting needs.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) refusals: Arc<Refusals>,
    pub(crate) connections: u32,
}

/// Takes connections until the stream is dropped.
pub(crate) fn accept(
    listener: TcpListener,
    door: Door,
) -> ReceiverStream<Result<Connection, io::Error>> {
    let (to, stream) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(door.connections as usize));
        loop {
            let accepted = tokio::select! {
                () = to.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection; trying again");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                let why = "as many connections as coordinator.max_connections allows are open";
                door.refusals.note(Some(from.ip()), "a connection", "connections", why);
                continue;
            };
            let (door, to) = (door.clone(), to.clone());
            tokio::spawn(async move {
                let let_in = tokio::select! {
                    () = to.closed() => return,
                    let_in = greet(stream, from, &door, place) => let_in,
                };
                if let Some(connection) = let_in {
                    // Fails when the server has ended.
                    drop(to.send(Ok(connection)).await);
                }
            });
        }
    });
    ReceiverStream::new(stream)
}

/// Makes the handshake, if there is one; `None` for who is turned away.
async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    door: &Door,
    place: OwnedSemaphorePermit,
) -> Option<Connection> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let Some(config) = &door.tls else {
        let peer = Peer { address, shown: Shown::Nothing };
        return Some(Connection { stream: Stream::Plain(stream), peer, _place: place });
    };
    let handshake = TlsAcceptor::from(config.clone()).accept(stream);
    let why = match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => {
            let shown = shown(&stream);
            let (stream, peer) = (Stream::Tls(Box::new(stream)), Peer { address, shown });
            return Some(Connection { stream, peer, _place: place });
        }
        // A probe of the port that says nothing is no attempt to get in.
        Ok(Err(error)) if is_probe(&error) => {
            tracing::debug!(%address, %error, "a connection ended before its handshake");
            return None;
        }
        Ok(Err(error)) => {
            let what = format!("a handshake: {}", kind(&error));
            door.refusals.note(Some(address.ip()), &what, "certificate", &error.to_string());
            return None;
        }
        Err(_) => format!("no handshake within {} s", HANDSHAKE.as_secs()),
    };
    door.refusals.note(Some(address.ip()), "a handshake: none", "certificate", &why);
    None
}

/// What kind of error it is: its words differ with each try where they give a time or a name.
fn kind(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let text = inner.map_or_else(|| format!("{:?}", error.kind()), |inner| format!("{inner:?}"));
    text.chars().take_while(|c| c.is_ascii_alphabetic() || *c == '(').collect()
}

fn is_probe(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn shown(stream: &TlsStream<TcpStream>) -> Shown {
    let (_, session) = stream.get_ref();
    let own = session.peer_certificates().and_then(|chain| chain.first());
    match own.map(|der| certificate::role(der)) {
        Some(Ok(role)) => Shown::Role(role),
        Some(Err(why)) => Shown::NoRole(why),
        None => Shown::NoRole("there is none".to_owned()),
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
