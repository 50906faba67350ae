//! Prints the page of `docs/metrics.md`.

fn main() {
    print!("{}", duet_service::metrics::table::page());
}
