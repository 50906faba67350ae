//! Which address of this machine the other ranks reach.

use std::net::{ToSocketAddrs, UdpSocket};

/// The local address that traffic to the coordinator leaves from: where the coordinator can be
/// reached, other ranks can reach this machine. Nothing is sent.
///
/// # Errors
/// Why it cannot be told, naming the coordinator.
pub fn towards(coordinator: &str) -> Result<String, String> {
    let bad =
        |reason: String| format!("cannot tell which address leads to {coordinator}: {reason}");
    let rest = coordinator.split_once("://").map_or(coordinator, |(_, rest)| rest);
    let authority = rest.split('/').next().unwrap_or_default();
    let mut targets = authority.to_socket_addrs().map_err(|error| bad(error.to_string()))?;
    let target = targets.next().ok_or_else(|| bad("it has no address".to_owned()))?;
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).map_err(|error| bad(error.to_string()))?;
    socket.connect(target).map_err(|error| bad(error.to_string()))?;
    let own = socket.local_addr().map_err(|error| bad(error.to_string()))?;
    Ok(own.ip().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_this_machine_is_the_loopback() {
        assert_eq!(towards("http://127.0.0.1:7777").unwrap(), "127.0.0.1");
        assert_eq!(towards("127.0.0.1:7777/path").unwrap(), "127.0.0.1");
        let error = towards("http://nowhere").unwrap_err();
        assert!(error.contains("which address leads to http://nowhere"), "{error}");
    }
}
