//! What a certificate says: whose role it is, and when it holds.

use crate::access::{Role, URI};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

/// From here to the end, a start is reason for a warning.
pub const SOON: Duration = Duration::from_secs(14 * 86_400);

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, String> {
    match X509Certificate::from_der(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(error) => Err(format!("not an X.509 certificate: {error}")),
    }
}

/// The role that a certificate gives.
///
/// # Errors
/// It gives none, several, or one that does not exist; in words.
pub fn role(der: &[u8]) -> Result<Role, String> {
    let certificate = parse(der)?;
    let names = certificate.subject_alternative_name();
    let names = names.map_err(|error| format!("its alternative names are damaged: {error}"))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let mut given = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(URI),
        _ => None,
    });
    let first = given.next().ok_or_else(|| format!("it names no `{URI}ROLE`"))?;
    if given.next().is_some() {
        return Err(format!("it names more than one `{URI}ROLE`"));
    }
    let shown: String = first.chars().take(32).collect();
    Role::named(first).ok_or_else(|| format!("there is no role `{}`", shown.escape_debug()))
}

/// Whether a certificate holds at `now`; what is left of its time.
///
/// # Errors
/// It does not hold yet, or no more: with the date.
pub fn left(der: &[u8], now: SystemTime) -> Result<Duration, String> {
    let certificate = parse(der)?;
    let (from, to) = (certificate.validity().not_before, certificate.validity().not_after);
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    if now < from.timestamp() {
        return Err(format!(
            "is not valid before {from}: is the clock of this machine right? If it is, make a new \
             one with `duet certs`"
        ));
    }
    let left = to.timestamp().saturating_sub(now);
    match u64::try_from(left) {
        Ok(left) => Ok(Duration::from_secs(left)),
        Err(_) => Err(format!("expired on {to}: make a new one with `duet certs`")),
    }
}

/// As [`left`], of the first certificate in a PEM text.
///
/// # Errors
/// As [`left`]; there is none.
pub fn pem_left(pem: &[u8], now: SystemTime) -> Result<Duration, String> {
    let der = CertificateDer::from_pem_slice(pem);
    left(&der.map_err(|error| format!("holds no certificate: {error}"))?, now)
}

/// A day as people write it, `2027-01-31`.
pub fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let time = i64::try_from(seconds).ok().and_then(|s| ASN1Time::from_timestamp(s).ok());
    time.map_or_else(
        || "later".to_owned(),
        |time| {
            let day = time.to_datetime().date();
            format!("{:04}-{:02}-{:02}", day.year(), u8::from(day.month()), day.day())
        },
    )
}
