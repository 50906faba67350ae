//! `duet certs`: a private authority and a certificate for each role.

mod authority;

pub use authority::{Authority, NEAR, Pair};

use crate::CliError;
use crate::args::CertsArgs;
use duet_service::access::Role;
use duet_service::certificate;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(86_400);
/// How long an authority holds.
const AUTHORITY: Duration = Duration::from_secs(3650 * 86_400);
/// Certificates hold from so long ago: clocks of machines differ.
const DRIFT: Duration = Duration::from_secs(3600);

/// Makes them.
///
/// # Errors
/// A file is there already; an authority that cannot be used; a host that is none.
pub fn run(args: &CertsArgs) -> Result<(), CliError> {
    let roles: Vec<Role> =
        if args.role.is_empty() { Role::ALL.to_vec() } else { args.role.clone() };
    let now = SystemTime::now();
    let hosts = hosts(&args.host)?;
    // Everything that can be wrong is looked for before the first file is written.
    for role in &roles {
        for file in files(*role) {
            free(&args.out.join(file))?;
        }
    }
    make_folder(&args.out)?;
    let (authority, end, fresh) = authority(&args.out, now)?;
    let wanted = now + DAY * args.days;
    let valid = now - DRIFT..wanted.min(end);
    println!("{}", args.out.display());
    let whose = if fresh { "new authority" } else { "authority that was there" };
    println!("  ca.crt ca.key   {whose}, until {}; only more certificates need ca.key", date(end));
    let local = args.host.is_empty() && roles.contains(&Role::Coordinator);
    for role in roles {
        let names = if role == Role::Coordinator { hosts.as_slice() } else { &[] };
        let pair = authority.issue(Some(role), names, valid.clone()).map_err(made)?;
        write(&args.out, role.as_str(), &pair)?;
        let [certificate, key] = files(role);
        let names =
            if names.is_empty() { String::new() } else { format!(" for {}", names.join(", ")) };
        println!("  {certificate} {key}   until {}{names}", date(valid.end));
    }
    if wanted > end {
        println!("They end with the authority, not after {} days.", args.days);
    }
    let (own, folder) = ("{role}", args.out.display());
    println!(
        "\n[security]\nca = \"{folder}/ca.crt\"\ncertificate = \"{folder}/{own}.crt\"\nkey = \"{folder}/{own}.key\""
    );
    if local {
        println!(
            "\nThe coordinator's certificate is good on this machine only: `--host` adds names."
        );
    }
    Ok(())
}

fn made(error: rcgen::Error) -> CliError {
    CliError::Usage(format!("no certificate can be made: {error}"))
}

fn files(role: Role) -> [String; 2] {
    [format!("{role}.crt"), format!("{role}.key")]
}

fn date(time: SystemTime) -> String {
    certificate::date(time)
}

/// The names of the coordinator: those that were given and those of its own machine.
fn hosts(given: &[String]) -> Result<Vec<String>, CliError> {
    for host in given {
        let is_address = host.parse::<std::net::IpAddr>().is_ok();
        let is_name = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.*".contains(&b));
        if !is_address && !is_name {
            return Err(CliError::Usage(format!(
                "--host {host}: give a name or an address, without scheme and port: \
                 `--host coordinator.example`, `--host 10.0.0.5`"
            )));
        }
    }
    let mut hosts = given.to_vec();
    hosts.extend(NEAR.map(str::to_owned));
    hosts.dedup();
    Ok(hosts)
}

fn free(path: &Path) -> Result<(), CliError> {
    if !path.exists() {
        return Ok(());
    }
    Err(CliError::Usage(format!(
        "{} is there, and nothing is overwritten: move it away, or make only the roles that are \
         missing with `--role`",
        path.display()
    )))
}

#[cfg(unix)]
fn make_folder(folder: &Path) -> Result<(), CliError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| CliError::io("create", folder, error))
}

#[cfg(not(unix))]
fn make_folder(folder: &Path) -> Result<(), CliError> {
    std::fs::create_dir_all(folder).map_err(|error| CliError::io("create", folder, error))
}

/// The folder's authority, made if there is none; when it ends; whether it is new.
fn authority(folder: &Path, now: SystemTime) -> Result<(Authority, SystemTime, bool), CliError> {
    let (crt, key) = (folder.join("ca.crt"), folder.join("ca.key"));
    match (crt.exists(), key.exists()) {
        (false, false) => {
            let end = now + AUTHORITY;
            let (authority, pair) = Authority::new(now - DRIFT..end).map_err(made)?;
            write(folder, "ca", &pair)?;
            Ok((authority, end, true))
        }
        (true, true) => {
            let text = |path: &Path| {
                std::fs::read_to_string(path).map_err(|error| CliError::io("read", path, error))
            };
            let pair = Pair { certificate: text(&crt)?, key: text(&key)? };
            let unusable =
                |why: String| CliError::Usage(format!("the authority {}: {why}", crt.display()));
            let left = certificate::pem_left(pair.certificate.as_bytes(), now).map_err(unusable)?;
            let authority = Authority::open(&pair).map_err(|error| unusable(error.to_string()))?;
            Ok((authority, now + left, false))
        }
        (there, _) => {
            let (one, other) = if there { ("ca.crt", "ca.key") } else { ("ca.key", "ca.crt") };
            Err(CliError::Usage(format!(
                "{} holds {one} without {other}: bring {other} back, or take another folder for a \
                 new authority",
                folder.display()
            )))
        }
    }
}

/// Writes `NAME.crt` and `NAME.key`; the key for nobody else's eyes.
fn write(folder: &Path, name: &str, pair: &Pair) -> Result<(), CliError> {
    for (end, text, mode) in [("key", &pair.key, 0o600), ("crt", &pair.certificate, 0o644)] {
        let path = folder.join(format!("{name}.{end}"));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
        let written = options.open(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(|error| CliError::io("write", &path, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use duet_service::tls::TlsFiles;
    use std::path::PathBuf;

    fn args(out: &Path, role: &[Role]) -> CertsArgs {
        CertsArgs { out: out.to_owned(), host: Vec::new(), days: 30, role: role.to_vec() }
    }

    fn refused(args: &CertsArgs) -> String {
        run(args).unwrap_err().to_string()
    }

    #[test]
    fn nothing_is_overwritten_and_what_is_missing_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("tls");
        run(&args(&out, &[])).unwrap();
        let key = |name: &str| std::fs::read(out.join(name)).unwrap();
        let before = (key("ca.key"), key("trainer.key"), key("reward.key"));
        assert!(refused(&args(&out, &[])).contains("coordinator.crt is there"));
        assert!(refused(&args(&out, &[Role::Reward])).contains("reward.crt is there"));
        for end in ["crt", "key"] {
            std::fs::remove_file(out.join("reward").with_extension(end)).unwrap();
        }
        run(&args(&out, &[Role::Reward])).unwrap();
        assert_eq!((key("ca.key"), key("trainer.key")), (before.0, before.1));
        assert_ne!(key("reward.key"), before.2);
        std::fs::remove_file(out.join("ca.key")).unwrap();
        std::fs::remove_file(out.join("viewer.crt")).unwrap();
        std::fs::remove_file(out.join("viewer.key")).unwrap();
        assert!(refused(&args(&out, &[Role::Viewer])).contains("without ca.key"));
        assert!(!out.join("viewer.key").exists());
    }

    #[test]
    fn a_server_takes_the_coordinators_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("tls");
        run(&args(&out, &[])).unwrap();
        for role in Role::ALL {
            let [certificate, key] = files(role).map(|file| out.join(file));
            let files = TlsFiles { ca: out.join("ca.crt"), certificate, key };
            assert_eq!(files.server().is_ok(), role == Role::Coordinator, "{role}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn keys_are_for_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("tls");
        run(&args(&out, &[])).unwrap();
        let files = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
        let keys: Vec<PathBuf> =
            files.filter(|f| f.extension().is_some_and(|e| e == "key")).collect();
        assert_eq!(keys.len(), 7);
        for key in keys {
            assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o077, 0);
        }
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for bad in ["", "http://a", "a:7400", "a b", "bücher.example"] {
            assert!(hosts(&[bad.to_owned()]).unwrap_err().to_string().contains("--host"), "{bad}");
        }
        let good = ["a.b-c.svc", "10.0.0.5", "fe80::1", "*.example"].map(str::to_owned);
        assert!(hosts(&good).unwrap().ends_with(&NEAR.map(str::to_owned)));
    }

    #[test]
    fn certificates_end_with_their_authority_at_the_latest() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("tls");
        std::fs::create_dir(&out).unwrap();
        let now = SystemTime::now();
        let pair = Authority::new(now - DAY..now + DAY * 3).unwrap().1;
        write(&out, "ca", &pair).unwrap();
        run(&args(&out, &[Role::Viewer])).unwrap();
        let left = certificate::pem_left(&std::fs::read(out.join("viewer.crt")).unwrap(), now);
        assert!(left.unwrap() <= DAY * 3);
        let pair = Authority::new(now - DAY * 3..now - DAY).unwrap().1;
        let old = folder.path().join("old");
        std::fs::create_dir(&old).unwrap();
        write(&old, "ca", &pair).unwrap();
        let said = refused(&args(&old, &[Role::Viewer]));
        assert!(said.contains("ca.crt") && said.contains("expired"), "{said}");
    }
}
