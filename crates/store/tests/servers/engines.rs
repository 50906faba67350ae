//! The servers: real ones, of others, each on a free port of this machine.

use super::proxy::{Plan, Proxy};
use duet_store::{Limits, Store};
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, RetryConfig};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What all tests' buckets and containers are called.
const BUCKET: &str = "ckpt";
/// Longest start of a server, on a busy machine.
const START: Duration = Duration::from_secs(120);
/// Azurite's one account, as published.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Makes Azurite's container: a request signed with the account's key.
const CONTAINER: &str = r"
import base64, datetime, hashlib, hmac, sys, urllib.request
port, account, key, name = sys.argv[1:]
date = datetime.datetime.now(datetime.timezone.utc).strftime('%a, %d %b %Y %H:%M:%S GMT')
version = '2023-11-03'
text = 'PUT' + '\n' * 12 + f'x-ms-date:{date}\nx-ms-version:{version}\n/{account}/{account}/{name}\nrestype:container'
mac = hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()
headers = {'x-ms-date': date, 'x-ms-version': version,
           'Authorization': f'SharedKey {account}:' + base64.b64encode(mac).decode()}
url = f'http://127.0.0.1:{port}/{account}/{name}?restype=container'
urllib.request.urlopen(urllib.request.Request(url, method='PUT', headers=headers))
";

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// moto: S3.
    Moto,
    /// Azurite: Azure's blobs.
    Azurite,
    /// Any S3 server that is running, by environment: `DUET_TEST_S3` = `host:port`, with
    /// `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    External,
}

/// A running server; killed with the value.
pub struct Server {
    engine: Engine,
    address: SocketAddr,
    child: Option<Child>,
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Where `scripts/servers.sh` installs them.
fn installed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv-servers")
}

impl Engine {
    /// Starts it; `None`, said loudly, where it is not installed. CI must have it.
    pub fn start(self) -> Option<Server> {
        let folder = tempfile::tempdir().expect("a folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
        let (mut command, address) = match self {
            Engine::Moto => {
                let mut command = Command::new(installed().join("bin/moto_server"));
                command.args(["-H", "127.0.0.1", "-p", &port.port().to_string()]);
                (command, port)
            }
            Engine::Azurite => {
                let program = installed().join("node_modules/.bin/azurite-blob");
                let mut command = Command::new(program);
                command.args(["--blobHost", "127.0.0.1", "--silent", "--skipApiVersionCheck"]);
                command.args(["--disableTelemetry", "--blobPort", &port.port().to_string()]);
                command.arg("--location").arg(folder.path());
                (command, port)
            }
            Engine::External => {
                let address = std::env::var("DUET_TEST_S3").ok()?;
                let address = address.parse().expect("DUET_TEST_S3 is host:port, in numbers");
                return Some(Server { engine: self, address, child: None, _folder: folder });
            }
        };
        if !Path::new(command.get_program()).exists() {
            let hint = "run scripts/servers.sh (`make servers`)";
            assert!(std::env::var_os("CI").is_none(), "{self:?} is not installed: {hint}");
            eprintln!("SKIPPED: {self:?} is not installed, so nothing is tested on it: {hint}");
            return None;
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = Some(child.expect("an installed program starts"));
        let server = Server { engine: self, address, child, _folder: folder };
        server.wait();
        server.make_bucket();
        Some(server)
    }
}

impl Server {
    fn wait(&self) {
        let begun = Instant::now();
        while TcpStream::connect(self.address).is_err() {
            assert!(begun.elapsed() < START, "{:?} does not answer", self.engine);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn make_bucket(&self) {
        match self.engine {
            Engine::Moto => {
                let mut stream = TcpStream::connect(self.address).expect("moto listens");
                let request = format!(
                    "PUT /{BUCKET} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\
                     Connection: close\r\n\r\n"
                );
                stream.write_all(request.as_bytes()).expect("moto reads");
                let mut answer = String::new();
                stream.read_to_string(&mut answer).expect("moto answers");
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }
            Engine::Azurite => {
                let port = self.address.port().to_string();
                let python = installed().join("bin/python");
                let made = Command::new(python)
                    .args(["-c", CONTAINER, &port, ACCOUNT, ACCOUNT_KEY, BUCKET])
                    .output()
                    .expect("python starts");
                assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            }
            Engine::External => {}
        }
    }

    /// The smallest part of a large object.
    pub fn part(&self) -> u64 {
        if self.engine == Engine::Azurite { 64 << 10 } else { 5 << 20 }
    }

    /// A store below `prefix`, as `Store::open` makes it, but reached through a proxy.
    pub fn store(&self, plan: Plan, prefix: &str, tries: u32) -> (Store, Proxy) {
        // As `Store::open` does; another test may have done it.
        drop(rustls::crypto::ring::default_provider().install_default());
        let proxy = Proxy::start(self.address, plan);
        let at = format!("http://{}", proxy.address());
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let store = match self.engine {
            Engine::Azurite => {
                let built = MicrosoftAzureBuilder::new()
                    .with_account(ACCOUNT)
                    .with_access_key(ACCOUNT_KEY)
                    .with_container_name(BUCKET)
                    .with_endpoint(format!("{at}/{ACCOUNT}"))
                    .with_allow_http(true)
                    .with_retry(retry)
                    .build();
                self.wrap(built.expect("options are complete"), prefix)
            }
            Engine::Moto | Engine::External => {
                let env = |name: &str| std::env::var(name).unwrap_or_else(|_| "test".to_owned());
                let built = AmazonS3Builder::new()
                    .with_bucket_name(BUCKET)
                    .with_region("us-east-1")
                    .with_access_key_id(env("AWS_ACCESS_KEY_ID"))
                    .with_secret_access_key(env("AWS_SECRET_ACCESS_KEY"))
                    .with_endpoint(at)
                    .with_allow_http(true)
                    .with_virtual_hosted_style_request(false)
                    .with_conditional_put(S3ConditionalPut::ETagMatch)
                    .with_retry(retry)
                    .build();
                self.wrap(built.expect("options are complete"), prefix)
            }
        };
        let limits = Limits {
            tries,
            backoff: Duration::from_millis(2),
            backoff_max: Duration::from_millis(20),
            ..Limits::default()
        };
        (store.with_limits(limits), proxy)
    }

    fn wrap<B: ObjectStore + MultipartStore>(&self, backend: B, prefix: &str) -> Store {
        let (backend, prefix) = (Arc::new(backend), Key::from(prefix));
        let parts: Arc<dyn MultipartStore> = backend.clone();
        let all = Arc::new(PrefixStore::new(backend, prefix.clone()));
        Store::with_backend(all, "server://").in_parts(parts, prefix, self.part())
    }
}
