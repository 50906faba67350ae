//! An object store that fails on demand: as much of S3's protocol as a run uses, over a folder.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// What goes wrong; each number is a share of requests, in thousandths.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vices {
    /// Answered with 500, and nothing was done.
    pub refused: u64,
    /// Carried out, but the connection ends before the answer.
    pub unanswered: u64,
    /// The answer ends in the middle.
    pub cut_short: u64,
    /// Every answer is held back for so long.
    pub delay: Duration,
}

struct Shared {
    folder: PathBuf,
    vices: Vices,
    /// Chooses which requests are hit.
    seed: u64,
    requests: AtomicU64,
    spoiled: AtomicU64,
}

/// The store. It lives until the process ends.
pub struct Objects {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Objects {
    /// Serves a folder as one bucket of any name.
    ///
    /// # Panics
    /// When no port is free.
    pub fn start(folder: &Path, vices: Vices, seed: u64) -> Objects {
        std::fs::create_dir_all(folder).expect("a folder");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (requests, spoiled) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared =
            Arc::new(Shared { folder: folder.to_path_buf(), vices, seed, requests, spoiled });
        let all = Arc::clone(&shared);
        std::thread::spawn(move || {
            for incoming in listener.incoming().flatten() {
                let shared = Arc::clone(&all);
                // A connection that breaks is the client's to mend.
                std::thread::spawn(move || drop(shared.serve(incoming)));
            }
        });
        Objects { address, shared }
    }

    /// The environment that leads a client here.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        let all = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "local"),
            ("AWS_ACCESS_KEY_ID", "nobody"),
            ("AWS_SECRET_ACCESS_KEY", "nothing"),
        ];
        all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// Requests so far, and how many of them went wrong.
    pub fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        (count(&self.shared.requests), count(&self.shared.spoiled))
    }
}

/// A request.
struct Request {
    method: String,
    key: String,
    query: String,
    create: bool,
    range: Option<(usize, usize)>,
    body: Vec<u8>,
}

/// An answer.
struct Answer {
    status: &'static str,
    headers: Vec<String>,
    body: Vec<u8>,
    /// What the length header says where the body itself is not sent.
    length: Option<u64>,
}

impl Answer {
    fn new(status: &'static str, body: Vec<u8>) -> Answer {
        Answer { status, headers: Vec::new(), body, length: None }
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        while let Some(request) = read(&mut reader)? {
            let number = self.requests.fetch_add(1, Ordering::SeqCst);
            let dice = crate::chaos::mix(self.seed, &number.to_string()) % 1000;
            let Vices { refused, unanswered, cut_short, delay } = self.vices;
            std::thread::sleep(delay);
            let spoiled = dice < refused + unanswered + cut_short;
            self.spoiled.fetch_add(u64::from(spoiled), Ordering::SeqCst);
            let answer = if dice < refused {
                Answer::new("500 Internal Server Error", b"<Error/>".to_vec())
            } else {
                self.carry_out(&request)
            };
            if dice >= refused && dice < refused + unanswered {
                return writer.shutdown(std::net::Shutdown::Both);
            }
            let bytes = answer.to_bytes();
            if dice >= refused && spoiled {
                writer.write_all(&bytes[..bytes.len() / 2])?;
                return writer.shutdown(std::net::Shutdown::Both);
            }
            writer.write_all(&bytes)?;
        }
        Ok(())
    }

    fn carry_out(&self, request: &Request) -> Answer {
        let path = self.folder.join(&request.key);
        let missing =
            || Answer::new("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>".to_vec());
        match request.method.as_str() {
            "GET" if request.query.contains("list-type=2") => self.list(&request.query),
            "GET" | "HEAD" => match (std::fs::read(&path), modified(&path)) {
                (Ok(bytes), Some(seconds)) => answer(request, bytes, seconds),
                _ => missing(),
            },
            "PUT" => match put(&path, &request.body, request.create) {
                Ok(()) => {
                    let mut answer = Answer::new("200 OK", Vec::new());
                    answer.headers.push(format!("ETag: {}", tag(&request.body)));
                    answer
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    Answer::new("412 Precondition Failed", b"<Error/>".to_vec())
                }
                Err(error) => {
                    Answer::new("500 Internal Server Error", error.to_string().into_bytes())
                }
            },
            "DELETE" => {
                // What is not there is as good as deleted.
                drop(std::fs::remove_file(path));
                Answer::new("204 No Content", Vec::new())
            }
            "POST" if request.query == "delete" => self.delete(&request.body),
            _ => Answer::new("501 Not Implemented", Vec::new()),
        }
    }

    /// Many at once: a list of keys in XML.
    fn delete(&self, body: &[u8]) -> Answer {
        let text = String::from_utf8_lossy(body);
        let mut gone = "<DeleteResult>".to_owned();
        for part in text.split("<Key>").skip(1) {
            let key = part.split("</Key>").next().unwrap_or_default();
            // What is not there is as good as deleted.
            drop(std::fs::remove_file(self.folder.join(key)));
            gone += &format!("<Deleted><Key>{key}</Key></Deleted>");
        }
        Answer::new("200 OK", (gone + "</DeleteResult>").into_bytes())
    }

    fn list(&self, query: &str) -> Answer {
        let prefix = query.split('&').find_map(|pair| pair.strip_prefix("prefix="));
        let prefix = decode(prefix.unwrap_or_default());
        let mut keys = Vec::new();
        collect(&self.folder, &self.folder, &mut keys);
        keys.retain(|key| key.starts_with(&prefix));
        keys.sort();
        let mut text = "<ListBucketResult><IsTruncated>false</IsTruncated>".to_owned();
        for key in keys {
            let path = self.folder.join(&key);
            let size = std::fs::metadata(&path).map_or(0, |meta| meta.len());
            // Gone since: as if it had never been listed.
            let Some(seconds) = modified(&path) else { continue };
            let date = dates(seconds).0;
            text += &format!(
                "<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>{date}</LastModified></Contents>"
            );
        }
        Answer::new("200 OK", (text + "</ListBucketResult>").into_bytes())
    }
}

fn answer(request: &Request, bytes: Vec<u8>, seconds: u64) -> Answer {
    let (tag, length) = (tag(&bytes), bytes.len());
    let mut answer = match request.range {
        Some((from, to)) if from < length => {
            let to = to.min(length - 1);
            let mut answer = Answer::new("206 Partial Content", bytes[from..=to].to_vec());
            answer.headers.push(format!("Content-Range: bytes {from}-{to}/{length}"));
            answer
        }
        _ => Answer::new("200 OK", bytes),
    };
    answer.headers.push(format!("ETag: {tag}"));
    answer.headers.push(format!("Last-Modified: {}", dates(seconds).1));
    if request.method == "HEAD" {
        answer.length = Some(length as u64);
        answer.body.clear();
    }
    answer
}

impl Answer {
    fn to_bytes(&self) -> Vec<u8> {
        let mut text = format!("HTTP/1.1 {}\r\n", self.status);
        for header in &self.headers {
            text += &format!("{header}\r\n");
        }
        let length = self.length.unwrap_or(self.body.len() as u64);
        if !self.status.starts_with("204") {
            text += &format!("Content-Length: {length}\r\n");
        }
        [(text + "\r\n").as_bytes(), &self.body].concat()
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    // The first part is the bucket.
    let key = path.trim_start_matches('/').split_once('/').map_or("", |(_, key)| key);
    let mut request = Request {
        method,
        key: decode(key),
        query: query.to_owned(),
        create: false,
        range: None,
        body: Vec::new(),
    };
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap_or(0),
            "if-none-match" => request.create = value == "*",
            "range" => request.range = range(value),
            _ => {}
        }
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body)?;
    Ok(Some(request))
}

fn range(value: &str) -> Option<(usize, usize)> {
    let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse().unwrap_or(usize::MAX)))
}

/// Whole or not at all, and with `create` only where nothing is.
fn put(path: &Path, bytes: &[u8], create: bool) -> std::io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or(path);
    std::fs::create_dir_all(folder)?;
    let number = NUMBER.fetch_add(1, Ordering::SeqCst);
    let part = folder.join(format!(".part-{}-{number}", std::process::id()));
    std::fs::write(&part, bytes)?;
    if !create {
        return std::fs::rename(&part, path);
    }
    let linked = std::fs::hard_link(&part, path);
    std::fs::remove_file(&part)?;
    linked
}

fn collect(root: &Path, folder: &Path, keys: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(root, &path, keys);
        } else if let Ok(key) = path.strip_prefix(root)
            && !entry.file_name().to_string_lossy().starts_with(".part-")
        {
            keys.push(key.display().to_string());
        }
    }
}

fn decode(text: &str) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (bytes[at], hex) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A name for content (FNV-1a); nobody here compares it with S3's own.
fn tag(bytes: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!("\"{:016x}\"", bytes.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

fn modified(path: &Path) -> Option<u64> {
    let at = std::fs::metadata(path).ok()?.modified().ok()?;
    Some(at.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs())
}

/// Seconds since 1970 as in RFC 3339 and as in RFC 2822 (civil date by Hinnant's algorithm).
fn dates(seconds: u64) -> (String, String) {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * index + 2) / 5 + 1;
    let month = if index < 10 { index + 3 } else { index - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let clock = format!("{hour:02}:{minute:02}:{second:02}");
    let (name, weekday) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let long = format!("{weekday}, {day:02} {name} {year} {clock} GMT");
    (format!("{year}-{month:02}-{day:02}T{clock}.000Z"), long)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let leap = dates(1_709_210_096);
        assert_eq!(leap.0, "2024-02-29T12:34:56.000Z");
        assert_eq!(leap.1, "Thu, 29 Feb 2024 12:34:56 GMT");
        assert_eq!(dates(0).1, "Thu, 01 Jan 1970 00:00:00 GMT");
    }

    #[test]
    fn keys_are_decoded() {
        assert_eq!(decode("lineage/iteration%3D000001/a-b"), "lineage/iteration=000001/a-b");
    }
}
