//! Mutual TLS: both sides show a certificate that the same authority signed.

use crate::access::Role;
use crate::certificate;
use duet_config::Tls;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tonic::transport::{ClientTlsConfig, Endpoint, Identity};

/// PEM files of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that are trusted.
    pub ca: PathBuf,
    /// Own certificate, with its role; the coordinator's is valid for the name that others connect to.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl From<Tls> for TlsFiles {
    fn from(Tls { ca, certificate, key }: Tls) -> TlsFiles {
        TlsFiles { ca, certificate, key }
    }
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

fn bad(key: &'static str, path: &Path, reason: impl ToString) -> TlsError {
    TlsError { key, path: path.to_owned(), reason: reason.to_string() }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| bad(key, path, error))
}

fn certificates(
    key: &'static str,
    path: &Path,
) -> Result<(Vec<u8>, Vec<CertificateDer<'static>>), TlsError> {
    let pem = read(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let found = found.map_err(|error| bad(key, path, error))?;
    if found.is_empty() {
        return Err(bad(key, path, "holds no PEM block with `BEGIN CERTIFICATE`"));
    }
    Ok((pem, found))
}

/// The files' contents.
struct Loaded {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    identity: Identity,
}

impl TlsFiles {
    fn load(&self) -> Result<Loaded, TlsError> {
        let (_, trusted) = certificates("ca", &self.ca)?;
        let mut roots = RootCertStore::empty();
        for certificate in trusted {
            holds("ca", &self.ca, &certificate)?;
            roots.add(certificate).map_err(|error| bad("ca", &self.ca, error))?;
        }
        let (certificate, chain) = certificates("certificate", &self.certificate)?;
        for part in &chain {
            holds("certificate", &self.certificate, part)?;
        }
        let key_pem = read("key", &self.key)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|_| bad("key", &self.key, "holds no PEM block with `PRIVATE KEY`"))?;
        private(&self.key);
        let identity = Identity::from_pem(certificate, key_pem);
        Ok(Loaded { roots: Arc::new(roots), chain, key, identity })
    }

    /// The server's side: a client without a certificate of the authority is refused.
    ///
    /// # Errors
    /// [`TlsError`] naming the file; also when the certificate is not a coordinator's, which no
    /// client would talk to, or not valid now.
    pub fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let Loaded { roots, chain, key, .. } = self.load()?;
        let role = chain.first().map(|own| certificate::role(own));
        match role {
            Some(Ok(Role::Coordinator)) => {}
            Some(Ok(role)) => {
                let reason = format!(
                    "is the certificate of role `{role}`: a server needs the coordinator's, or \
                     nobody will talk to it; write `{{role}}` for the role in the file's name"
                );
                return Err(bad("certificate", &self.certificate, reason));
            }
            Some(Err(why)) => {
                let reason = format!("gives no role: {why}; make one with `duet certs`");
                return Err(bad("certificate", &self.certificate, reason));
            }
            None => {}
        }
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| bad("ca", &self.ca, error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| bad("key", &self.key, error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| bad("key", &self.key, format!("does not fit: {error}")))?;
        config.alpn_protocols.push(b"h2".to_vec());
        Ok(Arc::new(config))
    }

    /// The client's side: a server without a certificate of the authority, for its name, with the
    /// role of a coordinator, is refused.
    ///
    /// # Errors
    /// [`TlsError`] naming the file.
    pub(crate) fn client(&self, endpoint: Endpoint) -> Result<Endpoint, TlsError> {
        let Loaded { roots, identity, .. } = self.load()?;
        let provider = Arc::new(ring::default_provider());
        let usual = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| bad("ca", &self.ca, error))?;
        let verifier = Arc::new(CoordinatorOnly { usual, provider });
        let config = ClientTlsConfig::new().identity(identity);
        endpoint
            .tls_config_with_verifier(config, verifier)
            .map_err(|error| bad("key", &self.key, innermost(&error)))
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(next) = inner.source() {
        inner = next;
    }
    inner.to_string()
}

/// Refuses what does not hold now, and warns of what soon will not.
fn holds(key: &'static str, path: &Path, der: &CertificateDer<'_>) -> Result<(), TlsError> {
    let left =
        certificate::left(der, SystemTime::now()).map_err(|reason| bad(key, path, reason))?;
    if left < certificate::SOON {
        let days = left.as_secs() / 86_400;
        tracing::warn!(path = %path.display(), days, "the certificate soon expires: `duet certs`");
    }
    Ok(())
}

#[cfg(unix)]
fn private(key: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(key).map(|meta| meta.permissions().mode()).unwrap_or_default();
    if mode & 0o007 != 0 {
        tracing::warn!(path = %key.display(), "everybody on this machine can read the key: chmod 600");
    }
}

#[cfg(not(unix))]
fn private(_: &Path) {}

/// The usual checks, and then the role.
#[derive(Debug)]
struct CoordinatorOnly {
    usual: Arc<WebPkiServerVerifier>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for CoordinatorOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let fine = self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        let refused = |text: String| rustls::Error::General(text);
        match certificate::role(end_entity) {
            Ok(Role::Coordinator) => Ok(fine),
            Ok(role) => Err(refused(format!(
                "who answers there has a certificate of role `{role}`, not the coordinator's"
            ))),
            Err(why) => Err(refused(format!(
                "who answers there has a certificate that gives no role ({why}): make the \
                 coordinator's with `duet certs`"
            ))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
