//! Logs: to stderr, one line an event, each with the process's role.

use std::fmt;
use std::io::IsTerminal;
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// Sends this process's logs to stderr; later calls in the same process change nothing.
///
/// `DUET_LOG`, else `RUST_LOG`, filters (`info`, `duet_service=debug,warn`, ...; default `info`).
/// `DUET_LOG_FORMAT=json` writes JSON lines with a `role` field. Colours only on a terminal, and
/// not when `NO_COLOR` is set.
pub fn init(role: &str) {
    let (filter, complaint) = filter();
    let json = std::env::var("DUET_LOG_FORMAT").is_ok_and(|format| format == "json");
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let ansi = !json && std::io::stderr().is_terminal() && !no_color;
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_env_filter(filter);
    let role = role.to_owned();
    let done = if json {
        let inner = Format::default().json().flatten_event(true);
        let fields = tracing_subscriber::fmt::format::JsonFields::new();
        let subscriber = builder.fmt_fields(fields).event_format(WithRole { inner, role, json });
        tracing::subscriber::set_global_default(subscriber.finish())
    } else {
        let inner = Format::default().compact();
        let subscriber = builder.event_format(WithRole { inner, role, json });
        tracing::subscriber::set_global_default(subscriber.finish())
    };
    if let (Ok(()), Some(complaint)) = (done, complaint) {
        tracing::warn!("{complaint}");
    }
}

/// The filter, and what was wrong with the one asked for.
fn filter() -> (EnvFilter, Option<String>) {
    for name in ["DUET_LOG", "RUST_LOG"] {
        let Ok(text) = std::env::var(name) else { continue };
        return match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => {
                let complaint = format!("{name} is not a log filter, `info` is used: {error}");
                (EnvFilter::new("info"), Some(complaint))
            }
        };
    }
    (EnvFilter::new("info"), None)
}

/// Puts the role into each line of another format.
struct WithRole<F> {
    inner: F,
    role: String,
    json: bool,
}

impl<S, N, F> FormatEvent<S, N> for WithRole<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if !self.json {
            write!(writer, "{} ", self.role)?;
            return self.inner.format_event(context, writer, event);
        }
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        let role = serde_json::Value::from(self.role.as_str());
        match line.strip_prefix('{') {
            Some(rest) => write!(writer, "{{\"role\":{role},{rest}"),
            None => writer.write_str(&line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_carry_the_role() {
        let sink = Sink::default();
        let writer = sink.clone();
        let format = WithRole {
            inner: Format::default().json().flatten_event(true),
            role: "rollout \"0\"".to_owned(),
            json: true,
        };
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(tracing_subscriber::fmt::format::JsonFields::new())
            .event_format(format)
            .finish();
        tracing::subscriber::with_default(subscriber, || tracing::info!(images = 3, "done"));
        let bytes = sink.0.lock().unwrap().clone();
        let line: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(line["role"], "rollout \"0\"");
        assert_eq!(line["images"], 3);
        assert_eq!(line["message"], "done");
    }
}
