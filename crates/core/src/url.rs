//! Addresses as they may be shown.

/// A URL without what may be a secret: all before an `@`, the query (`?sig=`, `?key=`) and the
/// fragment. A path that is no URL stays as it is.
///
/// Rather too much than too little: a password may hold a `/` that nobody escaped, so what stands
/// before the last `@` goes, even if it was a path.
pub fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let tail = rest.rsplit_once('@').map_or(rest, |(_, tail)| tail);
    let shown = tail.split(['?', '#']).next().unwrap_or_default();
    format!("{scheme}://{shown}")
}

#[cfg(test)]
mod tests {
    use super::without_credentials;

    #[test]
    fn no_secret_survives() {
        for url in [
            "s3://id:SECRET@bucket/prefix",
            "s3://id:SEC/RET:SECRET@bucket/prefix",
            "s3://id:SEC?RET#SECRET@bucket/prefix",
            "az://bucket/prefix?sv=1&sig=SECRET",
            "https://bucket/prefix#SECRET",
            "http://SECRET@bucket/prefix?token=SECRET#SECRET",
        ] {
            let shown = without_credentials(url);
            assert!(!shown.contains("SEC"), "{shown}");
            assert!(shown.ends_with("://bucket/prefix"), "{shown}");
        }
    }

    #[test]
    fn what_has_none_stays() {
        for url in ["s3://bucket/prefix", "runs/a@b", "/data/x?y", "http://127.0.0.1:1/score"] {
            assert_eq!(without_credentials(url), url);
        }
    }
}
