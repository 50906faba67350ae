//! Mutual TLS: both sides show a certificate that the same authority signed.

use std::path::{Path, PathBuf};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// PEM files of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that are trusted.
    pub ca: PathBuf,
    /// Own certificate, valid for the name that others connect to.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("security.{key}: {}: {reason}", path.display())]
pub struct TlsError {
    /// `ca`, `certificate` or `key`.
    pub key: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// What PEM calls the contents of each file.
fn read(key: &'static str, path: &Path, marker: &str) -> Result<Vec<u8>, TlsError> {
    let bad = |reason: String| TlsError { key, path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    if bytes.windows(marker.len()).any(|part| part == marker.as_bytes()) {
        return Ok(bytes);
    }
    Err(bad(format!("holds no PEM block with `{marker}`")))
}

impl TlsFiles {
    fn load(&self) -> Result<(Certificate, Identity), TlsError> {
        let ca = read("ca", &self.ca, "BEGIN CERTIFICATE")?;
        let certificate = read("certificate", &self.certificate, "BEGIN CERTIFICATE")?;
        let key = read("key", &self.key, "PRIVATE KEY")?;
        Ok((Certificate::from_pem(ca), Identity::from_pem(certificate, key)))
    }

    /// The server's side: a client without a certificate of the authority is refused.
    ///
    /// # Errors
    /// [`TlsError`] naming the file.
    pub fn server(&self) -> Result<ServerTlsConfig, TlsError> {
        let (ca, identity) = self.load()?;
        Ok(ServerTlsConfig::new().identity(identity).client_ca_root(ca).client_auth_optional(false))
    }

    /// The client's side: a server without one is refused.
    ///
    /// # Errors
    /// [`TlsError`] naming the file.
    pub fn client(&self) -> Result<ClientTlsConfig, TlsError> {
        let (ca, identity) = self.load()?;
        Ok(ClientTlsConfig::new().ca_certificate(ca).identity(identity))
    }
}
