//! Exit codes, after BSD `sysexits`, so that a supervisor knows whether starting again can help.

/// All went well, or the process was asked to stop.
pub const OK: u8 = 0;
/// Any other failure.
pub const OTHER: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 64;
/// A file, store or socket could not be read or written.
pub const IO: u8 = 74;
/// A failure that may pass (coordinator unreachable, peer lost): start the process again.
pub const RETRY: u8 = 75;
/// The configuration is wrong, or is not the run's: starting again cannot help.
pub const CONFIG: u8 = 78;
/// A second signal cut the orderly end short.
pub const INTERRUPTED: u8 = 130;
