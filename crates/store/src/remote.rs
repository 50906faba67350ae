//! Stores behind a network, where the program was built with them.

use crate::error::{Result, StoreError};
use crate::store::Store;
use duet_core::url::without_credentials;

/// Opens `scheme://bucket/prefix`.
pub(crate) fn open(scheme: &str, url: &str) -> Result<Store> {
    match scheme {
        #[cfg(feature = "s3")]
        "s3" => networked::s3(url),
        #[cfg(feature = "gcs")]
        "gs" => networked::gcs(url),
        #[cfg(feature = "azure")]
        "az" => networked::azure(url),
        _ => Err(StoreError::Url { url: without_credentials(url), reason: absent(scheme) }),
    }
}

fn absent(scheme: &str) -> String {
    let features = [("s3", "s3"), ("gs", "gcs"), ("az", "azure")];
    match features.iter().find(|(name, _)| *name == scheme) {
        Some((_, feature)) => format!(
            "this program was built without support for `{scheme}://`; build it with \
             `--features duet-store/{feature}`, or use a folder"
        ),
        None => format!(
            "`{scheme}://` is of no known kind; use a folder, `file://`, `s3://`, `gs://` or `az://`"
        ),
    }
}

#[cfg(any(feature = "s3", feature = "gcs", feature = "azure"))]
mod networked {
    use super::{Result, Store, StoreError, without_credentials};
    use crate::store::Limits;
    use object_store::multipart::MultipartStore;
    use object_store::path::Path;
    use object_store::prefix::PrefixStore;
    use object_store::{ClientConfigKey, ObjectStore, RetryConfig};
    use std::sync::Arc;
    use std::time::Duration;

    #[cfg(feature = "s3")]
    const S3: &str = "are the credentials set (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; without \
        them this machine's instance role is asked for), and AWS_REGION or, for another service than \
        Amazon's, AWS_ENDPOINT_URL? is the network open?";
    #[cfg(feature = "gcs")]
    const GCS: &str = "are the credentials set (GOOGLE_APPLICATION_CREDENTIALS or \
        GOOGLE_SERVICE_ACCOUNT; without them this machine's instance account is asked for)? is the \
        network open?";
    #[cfg(feature = "azure")]
    const AZURE: &str = "are the credentials set (AZURE_STORAGE_ACCOUNT_NAME and \
        AZURE_STORAGE_ACCOUNT_KEY; without the key this machine's identity is asked for)? is the \
        network open?";

    /// For a connection.
    const CONNECT: &str = "10 seconds";
    /// For a request: longer than any deadline of [`Store`], which grow with the object.
    const REQUEST: &str = "1 day";

    #[cfg(feature = "s3")]
    pub(super) fn s3(url: &str) -> Result<Store> {
        let (bucket, prefix) = parts(url)?;
        tls();
        let built = object_store::aws::AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_conditional_put(object_store::aws::S3ConditionalPut::ETagMatch)
            .with_retry(once())
            .with_config(
                object_store::aws::AmazonS3ConfigKey::Client(ClientConfigKey::ConnectTimeout),
                CONNECT,
            )
            .with_config(
                object_store::aws::AmazonS3ConfigKey::Client(ClientConfigKey::Timeout),
                REQUEST,
            )
            .build();
        store(url, prefix, built, S3)
    }

    #[cfg(feature = "gcs")]
    pub(super) fn gcs(url: &str) -> Result<Store> {
        let (bucket, prefix) = parts(url)?;
        tls();
        let built = object_store::gcp::GoogleCloudStorageBuilder::from_env()
            .with_bucket_name(bucket)
            .with_retry(once())
            .with_config(
                object_store::gcp::GoogleConfigKey::Client(ClientConfigKey::ConnectTimeout),
                CONNECT,
            )
            .with_config(
                object_store::gcp::GoogleConfigKey::Client(ClientConfigKey::Timeout),
                REQUEST,
            )
            .build();
        store(url, prefix, built, GCS)
    }

    #[cfg(feature = "azure")]
    pub(super) fn azure(url: &str) -> Result<Store> {
        let (container, prefix) = parts(url)?;
        tls();
        let built = object_store::azure::MicrosoftAzureBuilder::from_env()
            .with_container_name(container)
            .with_retry(once())
            .with_config(
                object_store::azure::AzureConfigKey::Client(ClientConfigKey::ConnectTimeout),
                CONNECT,
            )
            .with_config(
                object_store::azure::AzureConfigKey::Client(ClientConfigKey::Timeout),
                REQUEST,
            )
            .build();
        store(url, prefix, built, AZURE)
    }

    /// Objects that are larger go in parts of this size.
    const PART: u64 = 16 << 20;

    /// TLS for every client of this process: what gRPC uses, too.
    fn tls() {
        // Somebody else's choice stands.
        drop(rustls::crypto::ring::default_provider().install_default());
    }

    /// One try only: [`Store`] counts tries itself, and must know of each, since a creation whose
    /// answer was lost looks like somebody else's when it is tried again.
    fn once() -> RetryConfig {
        RetryConfig { max_retries: 0, ..RetryConfig::default() }
    }

    /// Bucket and prefix.
    fn parts(url: &str) -> Result<(&str, Path)> {
        let bad = |reason: &str| {
            let reason = format!("{reason}; write `scheme://bucket/prefix`");
            StoreError::Url { url: without_credentials(url), reason }
        };
        let (_, rest) = url.split_once("://").ok_or_else(|| bad("it has no scheme"))?;
        if rest.contains(['@', '?', '#']) {
            return Err(bad("credentials and options belong in the environment, not in the URL"));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(bad("it names no bucket"));
        }
        let prefix =
            Path::parse(prefix.trim_matches('/')).map_err(|error| bad(&error.to_string()))?;
        Ok((bucket, prefix))
    }

    fn store<B: ObjectStore + MultipartStore>(
        url: &str,
        prefix: Path,
        built: object_store::Result<B>,
        remedy: &str,
    ) -> Result<Store> {
        let backend = built.map_err(|error| StoreError::Url {
            url: without_credentials(url),
            reason: format!("{error}; credentials come from the usual environment variables"),
        })?;
        let backend = Arc::new(backend);
        let parts: Arc<dyn MultipartStore> = backend.clone();
        let backend = Arc::new(PrefixStore::new(backend, prefix.clone()));
        // About three minutes of trouble are sat out.
        let limits = Limits {
            tries: 14,
            backoff: Duration::from_millis(250),
            backoff_max: Duration::from_secs(20),
            ..Limits::default()
        };
        let store = Store::with_backend(backend, url).with_limits(limits);
        Ok(store.in_parts(parts, prefix, PART).behind_network(remedy))
    }
}
