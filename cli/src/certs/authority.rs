//! A private authority and what it signs.

use duet_service::access::Role;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::ops::Range;
use std::time::SystemTime;

/// What only whoever talks to the coordinator on the same machine needs: always in its certificate.
pub const NEAR: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// A certificate and its key, PEM.
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its key, PKCS #8.
    pub key: String,
}

/// A private authority: P-256, signs certificates of processes and no other authorities.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one, and its files.
    ///
    /// # Errors
    /// There is no randomness to make a key of.
    pub fn new(valid: Range<SystemTime>) -> Result<(Authority, Pair), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "Duet authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (valid.start.into(), valid.end.into());
        let certificate = params.self_signed(&key)?.pem();
        let pair = Pair { certificate, key: key.serialize_pem() };
        Ok((Authority { issuer: Issuer::new(params, key) }, pair))
    }

    /// The one whose files these are.
    ///
    /// # Errors
    /// They are not an authority's.
    pub fn open(pair: &Pair) -> Result<Authority, rcgen::Error> {
        let key = KeyPair::from_pem(&pair.key)?;
        Ok(Authority { issuer: Issuer::from_ca_cert_pem(&pair.certificate, key)? })
    }

    /// A certificate for a role. `hosts` are names and addresses that others connect to: only a
    /// coordinator has any.
    ///
    /// # Errors
    /// A host is no name.
    pub fn issue(
        &self,
        role: Option<Role>,
        hosts: &[String],
        valid: Range<SystemTime>,
    ) -> Result<Pair, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(hosts)?;
        let name = role.map_or("nobody", Role::as_str);
        params.distinguished_name.push(DnType::CommonName, format!("duet {name}"));
        if let Some(role) = role {
            params.subject_alt_names.push(SanType::URI(role.uri().try_into()?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // The coordinator's host asks it for its status with the coordinator's own certificate.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if role == Some(Role::Coordinator) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (valid.start.into(), valid.end.into());
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Pair { certificate, key: key.serialize_pem() })
    }
}
