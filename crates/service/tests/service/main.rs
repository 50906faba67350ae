//! Calls between processes: who may make them, how they are answered, what a session survives.

mod access;
mod probes;
mod session;
mod tls;
