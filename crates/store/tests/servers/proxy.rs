//! Between a store's client and its server: counts requests and does to some of them what networks and
//! servers do.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Longest wait for a byte from either side.
const PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is passed on, and answered.
    Passed,
    /// It is passed on in small pieces, with pauses.
    Slow,
    /// It never arrives; the answer is 500.
    Refused,
    /// It takes effect; the answer is 500.
    Unheard,
    /// The connection is lost in the middle of its body.
    Cut,
    /// It takes effect; the connection is lost before the answer.
    Lost,
}

/// When which fate.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// All are passed.
    Honest,
    /// Four in ten are hit by something, drawn from this seed.
    Faulty(u64),
    /// After so many requests nothing comes through any more: the client's process is dead. Whether
    /// the last one still takes effect.
    Dies(i64, bool),
}

struct State {
    upstream: SocketAddr,
    plan: Plan,
    left: AtomicI64,
    dice: AtomicU64,
    fates: Mutex<Vec<Fate>>,
    closed: AtomicBool,
}

/// A proxy on a port of its own, as long as the value lives.
pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
}

impl Proxy {
    /// One before the server at `upstream`.
    pub fn start(upstream: SocketAddr, plan: Plan) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (left, seed) = match plan {
            Plan::Dies(requests, _) => (requests, 0),
            Plan::Faulty(seed) => (i64::MAX, seed),
            Plan::Honest => (i64::MAX, 0),
        };
        let (left, dice) = (AtomicI64::new(left), AtomicU64::new(seed.wrapping_mul(2) | 1));
        let state = Arc::new(State {
            upstream,
            plan,
            left,
            dice,
            fates: Mutex::default(),
            closed: AtomicBool::new(false),
        });
        let own = state.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if own.closed.load(Ordering::Relaxed) {
                    return;
                }
                let state = own.clone();
                thread::spawn(move || drop(serve(client, &state)));
            }
        });
        Proxy { address, state }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What has become of requests so far.
    pub fn fates(&self) -> Vec<Fate> {
        self.state.fates.lock().unwrap().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for clients.
        drop(TcpStream::connect(self.address));
    }
}

impl State {
    fn fate(&self) -> Fate {
        let fate = match self.plan {
            Plan::Honest => Fate::Passed,
            Plan::Dies(_, works) => match self.left.fetch_sub(1, Ordering::Relaxed) {
                1.. => Fate::Passed,
                0 if works => Fate::Lost,
                _ => Fate::Cut,
            },
            Plan::Faulty(_) => {
                let next = |x: u64| x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
                let before =
                    self.dice.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |x| Some(next(x)));
                match (before.unwrap_or_default() >> 40) % 100 {
                    0..10 => Fate::Refused,
                    10..18 => Fate::Unheard,
                    18..28 => Fate::Cut,
                    28..35 => Fate::Lost,
                    35..40 => Fate::Slow,
                    _ => Fate::Passed,
                }
            }
        };
        self.fates.lock().unwrap().push(fate);
        fate
    }
}

/// The head of a message, up to and including the empty line.
fn head(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if from.read(&mut byte)? == 0 || head.len() > 1 << 16 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.push(byte[0]);
    }
    Ok(head)
}

fn length(head: &[u8]) -> usize {
    let text = String::from_utf8_lossy(head).to_ascii_lowercase();
    let line = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// The same head, after which the connection is closed, so that each connection has one request.
fn closing(head: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(head);
    let kept = text.split("\r\n").filter(|line| {
        let line = line.to_ascii_lowercase();
        !line.is_empty() && !line.starts_with("connection:") && !line.starts_with("keep-alive:")
    });
    let mut lines: Vec<&str> = kept.collect();
    lines.push("Connection: close");
    (lines.join("\r\n") + "\r\n\r\n").into_bytes()
}

/// One request on one connection.
fn serve(mut client: TcpStream, state: &State) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let request = head(&mut client)?;
    let fate = state.fate();
    let mut body = vec![0; length(&request)];
    if String::from_utf8_lossy(&request).to_ascii_lowercase().contains("expect: 100-continue") {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    if fate == Fate::Cut {
        // Half of it arrives at the server, which sees the connection end.
        let half = body.len() / 2;
        client.read_exact(&mut body[..half])?;
        if half > 0 {
            let mut server = TcpStream::connect(state.upstream)?;
            server.write_all(&closing(&request))?;
            server.write_all(&body[..half])?;
            server.shutdown(Shutdown::Both)?;
        }
        return client.shutdown(Shutdown::Both);
    }
    client.read_exact(&mut body)?;
    let refusal =
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    if fate == Fate::Refused {
        return client.write_all(refusal);
    }
    let mut server = TcpStream::connect(state.upstream)?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.write_all(&closing(&request))?;
    if fate == Fate::Slow {
        for piece in body.chunks((body.len() / 8).max(1)) {
            server.write_all(piece)?;
            thread::sleep(Duration::from_millis(5));
        }
    } else {
        server.write_all(&body)?;
    }
    let answer = head(&mut server)?;
    match fate {
        Fate::Unheard => return client.write_all(refusal),
        Fate::Lost => return client.shutdown(Shutdown::Both),
        _ => {}
    }
    client.write_all(&closing(&answer))?;
    io::copy(&mut server, &mut client)?;
    client.shutdown(Shutdown::Write)
}
