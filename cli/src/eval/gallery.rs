//! `index.html`: every prompt of an evaluation with its images and scores, to browse.
//!
//! One file that opens without a server. Small sets of images are inside it; of large ones it holds
//! references to `images/` beside it.

use super::{Entry, Report, Shown};
use crate::CliError;
use std::fmt::Write;
use std::path::Path;

/// Up to so many bytes, images are put into the page.
const INLINE_BYTES: u64 = 24 << 20;

const STYLE: &str = include_str!("gallery.css");
const SCRIPT: &str = include_str!("gallery.js");

/// Writes the gallery.
///
/// # Errors
/// An image cannot be read, or the page not be written.
pub fn write(report: &Report, folder: &Path) -> Result<(), CliError> {
    let size = |image: &Shown| {
        let path = folder.join(&image.file);
        std::fs::metadata(&path).map(|m| m.len()).map_err(|e| CliError::io("read", &path, e))
    };
    let images = report.entries.iter().flat_map(|entry| &entry.images);
    let total: u64 = images.map(size).sum::<Result<u64, _>>()?;
    let page = page(report, &|image| {
        if total > INLINE_BYTES {
            return Ok(escape(&image.file));
        }
        let path = folder.join(&image.file);
        let bytes = std::fs::read(&path).map_err(|e| CliError::io("read", &path, e))?;
        Ok(format!("data:image/png;base64,{}", base64(&bytes)))
    })?;
    let path = folder.join("index.html");
    std::fs::write(&path, page).map_err(|e| CliError::io("write", &path, e))
}

/// The page; `source` gives what an image is shown from.
fn page(
    report: &Report,
    source: &dyn Fn(&Shown) -> Result<String, CliError>,
) -> Result<String, CliError> {
    let totals = &report.totals;
    let main = totals.columns.first().cloned().unwrap_or_default();
    let title = format!("{} — {}", report.model.display(), report.suite);
    let mut html = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{}</title><style>{STYLE}</style></head><body>\n<header><h1>{}</h1>\n",
        escape(&title),
        escape(&title)
    );
    summary(&mut html, report);
    html.push_str("</header>\n<nav>\n");
    let _ = write!(
        html,
        "<input id=\"search\" type=\"search\" placeholder=\"search {} prompts\" \
         aria-label=\"search\">\n<select id=\"category\" aria-label=\"category\">\
         <option value=\"\">every category</option>",
        report.entries.len()
    );
    for (name, _) in &totals.categories {
        let _ = write!(html, "<option>{}</option>", escape(name));
    }
    let _ = write!(
        html,
        "</select>\n<select id=\"order\" aria-label=\"order\"><option value=\"at\">in the suite's \
         order</option><option value=\"low\">lowest {0} first</option><option value=\"high\">\
         highest {0} first</option></select>\n<span id=\"count\"></span></nav>\n<main>\n",
        escape(&main)
    );
    for (at, entry) in report.entries.iter().enumerate() {
        card(&mut html, at, entry, &main, source)?;
    }
    let _ = writeln!(html, "</main>\n<script>{SCRIPT}</script>\n</body></html>");
    Ok(html)
}

fn summary(html: &mut String, report: &Report) {
    let totals = &report.totals;
    html.push_str("<table><thead><tr><th>category</th><th>prompts</th>");
    for column in &totals.columns {
        let _ = write!(html, "<th>{}</th>", escape(column));
    }
    html.push_str("</tr></thead><tbody>\n");
    let overall = ("overall".to_owned(), totals.overall.clone());
    for (name, means) in totals.categories.iter().chain([&overall]) {
        let class = if name == "overall" { " class=\"overall\"" } else { "" };
        let _ = write!(html, "<tr{class}><td>{}</td><td>{}</td>", escape(name), means.prompts);
        for column in &totals.columns {
            let _ = match means.means.get(column) {
                Some(value) => write!(html, "<td>{:.1}</td>", 100.0 * value),
                None => write!(html, "<td>–</td>"),
            };
        }
        html.push_str("</tr>\n");
    }
    let _ = write!(html, "</tbody></table>\n<p>Of 100. Overall: {}.", escape(&totals.weighting));
    if !totals.missing.is_empty() {
        let _ = write!(html, " Nothing was scored of {}.", escape(&totals.missing.join(", ")));
    }
    if totals.overall.unscored > 0 && !totals.columns.is_empty() {
        let _ = write!(html, " {} images are unscored.", totals.overall.unscored);
    }
    html.push_str("</p>\n");
}

fn card(
    html: &mut String,
    at: usize,
    entry: &Entry,
    main: &str,
    source: &dyn Fn(&Shown) -> Result<String, CliError>,
) -> Result<(), CliError> {
    let values: Vec<f64> =
        entry.images.iter().filter_map(|image| image.scores.get(main).copied()).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let score = if values.is_empty() { String::new() } else { format!("{mean:.4}") };
    let _ = write!(
        html,
        "<article data-at=\"{at}\" data-category=\"{}\" data-score=\"{score}\">\n<div \
         class=\"images\">",
        escape(&entry.category)
    );
    for image in &entry.images {
        let _ = write!(
            html,
            "<figure><img loading=\"lazy\" src=\"{}\" alt=\"{}\"><figcaption>",
            source(image)?,
            escape(&entry.refined_prompt)
        );
        // What counts stands first.
        let (first, rest): (Vec<_>, Vec<_>) = image.scores.iter().partition(|(n, _)| *n == main);
        for (name, value) in first.into_iter().chain(rest) {
            let class = if name == main { "chip main" } else { "chip" };
            let _ = write!(
                html,
                "<span class=\"{class}\" style=\"--v:{value:.3}\">{} {:.0}</span>",
                escape(name),
                100.0 * value
            );
        }
        for (name, reason) in &image.failed {
            let _ = write!(
                html,
                "<span class=\"chip failed\" title=\"{}\">{} unscored</span>",
                escape(reason),
                escape(name)
            );
        }
        html.push_str("</figcaption></figure>");
    }
    let _ = write!(
        html,
        "</div>\n<p class=\"prompt\">{}</p>\n<p class=\"refined\">{}</p>\n",
        escape(&entry.prompt),
        escape(&entry.refined_prompt)
    );
    if !entry.trace.trim().is_empty() {
        let _ = writeln!(
            html,
            "<details><summary>what it thought</summary><pre>{}</pre></details>",
            escape(entry.trace.trim())
        );
    }
    let _ = writeln!(
        html,
        "<footer><span>{}</span><span>{}</span></footer></article>",
        escape(&entry.category),
        escape(&entry.id)
    );
    Ok(())
}

/// Text that is nothing but text, in elements and in attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Base64 with padding (RFC 4648 section 4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let part = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let group = part(0) << 16 | part(1) << 8 | part(2);
        for place in 0..4 {
            let digit = (group >> (18 - 6 * place)) & 63;
            let shown = place <= chunk.len();
            out.push(if shown { DIGITS[digit as usize] as char } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::score::Totals;
    use std::collections::BTreeMap;

    #[test]
    fn base64_is_rfc_4648s() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(b"foobar"), "Zm9vYmFy");
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn whatever_a_prompt_holds_is_shown_as_text() {
        let nasty = "<script>alert(\"&'\")</script>";
        let image = Shown {
            file: "images/00000-0.png".to_owned(),
            scores: BTreeMap::from([("wiscore".to_owned(), 0.25)]),
            failed: BTreeMap::from([("quality".to_owned(), nasty.to_owned())]),
        };
        let entry = Entry {
            id: nasty.to_owned(),
            category: nasty.to_owned(),
            prompt: nasty.to_owned(),
            trace: nasty.to_owned(),
            refined_prompt: nasty.to_owned(),
            images: vec![image],
        };
        let report = Report {
            format: String::new(),
            suite: nasty.to_owned(),
            files: Vec::new(),
            model: nasty.into(),
            settings: serde_json::Value::Null,
            totals: Totals {
                columns: vec!["wiscore".to_owned()],
                categories: vec![(nasty.to_owned(), Default::default())],
                overall: Default::default(),
                weighting: nasty.to_owned(),
                missing: vec![nasty.to_owned()],
            },
            entries: vec![entry],
        };
        let html = page(&report, &|image| Ok(escape(&image.file))).unwrap();
        assert!(!html.contains("<script>alert"));
        assert_eq!(html.matches("<script>").count(), 1, "the page's own");
        assert!(html.contains("data-score=\"0.2500\"") && html.contains("wiscore 25"));
        for tag in ["article", "main", "header", "nav", "table", "figure", "details", "footer"] {
            let opened = html.matches(&format!("<{tag}>")).count()
                + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }
}
