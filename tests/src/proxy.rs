//! A network that can be cut, slowed and led elsewhere: a TCP proxy between workers and coordinator.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often a connection looks whether it still may be.
const LOOK: Duration = Duration::from_millis(20);

struct Wire {
    target: Mutex<SocketAddr>,
    cut: AtomicBool,
    delay_ms: AtomicU64,
    bytes: AtomicU64,
}

/// A proxy. It lives until the process ends.
#[derive(Clone)]
pub struct Proxy {
    address: SocketAddr,
    wire: Arc<Wire>,
}

impl Proxy {
    /// A proxy to `target`.
    ///
    /// # Panics
    /// When no port is free.
    pub fn start(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let wire = Arc::new(Wire {
            target: Mutex::new(target),
            cut: AtomicBool::new(false),
            delay_ms: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let shared = Arc::clone(&wire);
        std::thread::spawn(move || {
            for incoming in listener.incoming().flatten() {
                let wire = Arc::clone(&shared);
                std::thread::spawn(move || connect(&wire, incoming));
            }
        });
        Proxy { address, wire }
    }

    /// Where it listens, as a coordinator's address.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Leads new connections elsewhere.
    ///
    /// # Panics
    /// When a connection's thread has panicked.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.wire.target.lock().expect("no panic") = target;
    }

    /// Cuts the network: nothing gets through and nobody is told, until it is mended.
    pub fn cut(&self, cut: bool) {
        self.wire.cut.store(cut, Ordering::SeqCst);
    }

    /// Holds each piece of data back for so long.
    pub fn slow(&self, delay: Duration) {
        self.wire.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Bytes that went through.
    pub fn bytes(&self) -> u64 {
        self.wire.bytes.load(Ordering::SeqCst)
    }
}

fn connect(wire: &Arc<Wire>, near: TcpStream) {
    while wire.cut.load(Ordering::SeqCst) {
        std::thread::sleep(LOOK);
    }
    let target = *wire.target.lock().expect("no panic");
    let Ok(far) = TcpStream::connect(target) else { return };
    let (Ok(near2), Ok(far2)) = (near.try_clone(), far.try_clone()) else { return };
    let back = Arc::clone(wire);
    std::thread::spawn(move || pump(&back, far2, near2));
    pump(wire, near, far);
}

fn pump(wire: &Wire, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        std::thread::sleep(Duration::from_millis(wire.delay_ms.load(Ordering::SeqCst)));
        while wire.cut.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK);
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
        wire.bytes.fetch_add(count as u64, Ordering::SeqCst);
    }
    // Either end may be gone already.
    drop(from.shutdown(std::net::Shutdown::Both));
    drop(to.shutdown(std::net::Shutdown::Both));
}
