//! Suites as their authors' files and scripts have them.

use super::score::{ImageScores, Roles, columns, of_image, totals};
use super::{Format, read};
use std::collections::BTreeMap;
use std::path::PathBuf;

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn wise(id: u64, subcategory: &str) -> String {
    format!(
        "{{\"Prompt\": \"p{id}\", \"Explanation\": \"e\", \"Category\": \"c\", \
         \"Subcategory\": \"{subcategory}\", \"prompt_id\": {id}}}"
    )
}

fn said(files: &[PathBuf], questions: &[PathBuf]) -> String {
    read(files, questions, None).unwrap_err().to_string()
}

fn scores(list: &[(&str, f64)]) -> BTreeMap<String, f64> {
    list.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

#[test]
fn wise_is_read_and_weighted_as_its_scripts_do() {
    let files = Files::new();
    let culture = files.put("culture.json", &format!("[{}]", wise(1, "Festival")));
    let rest: Vec<String> = [
        wise(401, "Horizontal time"),
        wise(568, "Geographical location"),
        wise(701, "Plant"),
        wise(801, "Optics"),
        wise(1000, "Combustion"),
    ]
    .into();
    let rest = files.put("rest.json", &format!("[{}]", rest.join(",")));
    let suite = read(&[culture, rest], &[], None).unwrap();
    assert_eq!(suite.format, Format::Wise);
    let found: Vec<&str> = suite.items.iter().map(|item| item.category.as_str()).collect();
    assert_eq!(found, ["cultural", "time", "space", "biology", "physics", "chemistry"]);
    assert_eq!(suite.items[0].meta["Explanation"], "e", "the judge is told");

    let roles = Roles::new(Format::Wise, &[]).unwrap();
    let image = |semantic: f64| {
        let all = scores(&[("semantic", semantic), ("consistency", 0.5), ("aesthetic", 1.0)]);
        vec![of_image(Format::Wise, &suite.items[0], &all, &roles)]
    };
    // Marks of 2, 1 and 2 of 2: (0.7 * 2 + 0.2 * 1 + 0.1 * 2) / 2.
    assert!((image(1.0)[0]["wiscore"] - 0.9).abs() < 1e-12);
    let semantics = [1.0, 0.5, 0.0, 1.0, 0.0, 0.5];
    let images: Vec<_> = semantics.map(image).into();
    let totals = totals(&suite, columns(Format::Wise, &[]), &images);
    let wi = |c: f64| 0.7 * c + 0.2;
    let want =
        0.4 * wi(1.0) + 0.167 * wi(0.5) + 0.133 * wi(0.0) + 0.1 * (wi(1.0) + wi(0.0) + wi(0.5));
    assert!((totals.overall.means["wiscore"] - want).abs() < 1e-12, "{totals:?}");
    assert!(totals.missing.is_empty());
    // The published figures of the paper's table 1 add up the same way.
    let published = [0.80, 0.74, 0.83, 0.81, 0.85, 0.66];
    let overall: f64 =
        super::wise::WEIGHTS.iter().zip(published).map(|((_, weight), score)| weight * score).sum();
    assert!((overall - 0.786).abs() < 1e-3, "{overall}");
}

#[test]
fn what_is_missing_is_named_and_left_out_never_a_zero() {
    let files = Files::new();
    let text = format!("[{},{}]", wise(2, "x"), wise(750, "y"));
    let suite = read(&[files.put("a.json", &text)], &[], None).unwrap();
    let roles = Roles::new(Format::Wise, &[]).unwrap();
    let full = scores(&[("semantic", 1.0), ("consistency", 1.0), ("aesthetic", 1.0)]);
    let of = |all: &BTreeMap<String, f64>| of_image(Format::Wise, &suite.items[0], all, &roles);
    let images = vec![vec![of(&full), of(&scores(&[("semantic", 0.0)]))], vec![of(&full)]];
    let totals = totals(&suite, columns(Format::Wise, &[]), &images);
    assert_eq!(totals.categories[0].1.unscored, 1);
    assert!((totals.categories[0].1.means["wiscore"] - 1.0).abs() < 1e-12, "the scored one alone");
    assert!((totals.overall.means["wiscore"] - 1.0).abs() < 1e-12);
    assert_eq!(totals.missing, ["chemistry", "physics", "space", "time"]);
}

#[test]
fn t2i_reasonbench_is_read_with_its_questions() {
    let files = Files::new();
    let idiom =
        files.put("idiom_interpretation.json", "[{\"prompt\": \"a\"}, {\"prompt\": \"b\"}]");
    let entity = files.put("entity_reasoning.json", "[{\"prompt\": \"c\", \"id\": 9}]");
    let questions = files.put(
        "evaluation_entity.json",
        "[{\"id\": 1, \"entity_evaluation\": {\"q1\": \"?\"}, \"other_details_evaluation\": {}, \
         \"quality_evaluation\": {}}]",
    );
    let both = [idiom.clone(), entity.clone()];
    let suite = read(&both, std::slice::from_ref(&questions), None).unwrap();
    assert_eq!(suite.format, Format::T2iReasonbench);
    let ids: Vec<&str> = suite.items.iter().map(|item| item.id.as_str()).collect();
    assert_eq!(ids, ["idiom-0001", "idiom-0002", "entity-0001"]);
    assert_eq!(suite.items[2].meta["questions"]["entity_evaluation"]["q1"], "?");

    let roles = Roles::new(Format::T2iReasonbench, &["reasoning=reason".to_owned()]).unwrap();
    let all = scores(&[("reason", 1.0), ("details", 0.5), ("quality", 0.8), ("semantic", 0.0)]);
    let of = |at: usize| of_image(suite.format, &suite.items[at], &all, &roles);
    assert_eq!(of(0)["accuracy"], 1.0, "details do not count for idioms");
    assert!((of(2)["accuracy"] - 0.85).abs() < 1e-12, "0.7 reasoning + 0.3 details");
    let images = vec![vec![of(0)], vec![of(1)], vec![of(2)]];
    let totals = totals(&suite, columns(suite.format, &[]), &images);
    assert!((totals.overall.means["accuracy"] - 0.925).abs() < 1e-12, "dimensions weigh the same");
    assert_eq!(totals.missing, ["scientific", "textual"]);

    let few = files.put("evaluation_idiom.json", "[{\"id\": 1}]");
    assert!(said(std::slice::from_ref(&idiom), &[few]).contains("idiom-0002"));
    let alien = files.put("evaluation_entity2.json", "[{\"id\": 1}, {\"id\": 7}]");
    assert!(said(&[entity], &[alien]).contains("entity prompt 7"));
    let nameless = files.put("prompts.json", "[{\"prompt\": \"a\"}]");
    assert!(said(&[nameless], &[]).contains("dimensions"));
}

#[test]
fn a_prompt_file_is_a_suite_of_its_categories() {
    let files = Files::new();
    let own = files.put(
        "own.jsonl",
        "{\"prompt\": \"a\", \"meta\": {\"category\": \"facts\"}}\n{\"prompt\": \"b\"}\n",
    );
    let suite = read(&[own], &[], None).unwrap();
    assert_eq!((suite.format, suite.items[0].category.as_str()), (Format::Duet, "facts"));
    let one = |row, value| ImageScores {
        row,
        scores: scores(&[("aesthetic", value), ("semantic", value)]),
        ..ImageScores::default()
    };
    let list = [one(0, 0.25), one(1, 0.75)];
    let names = columns(Format::Duet, &list);
    assert_eq!(names, ["semantic", "aesthetic"]);
    let images = list.map(|one| vec![one.scores]);
    let totals = totals(&suite, names, &images);
    assert_eq!(totals.categories.len(), 1);
    assert_eq!(totals.overall.means["semantic"], 0.5);
}

#[test]
fn broken_suites_are_named_with_their_entry() {
    let files = Files::new();
    let of = |text: &str| said(&[files.put("suite.json", text)], &[]);
    assert!(of("[1]").contains("entry 1 is no object"));
    assert!(of("[{\"a\": 1}]").contains("neither"));
    assert!(of("[{\"Prompt\": \"p\"").contains("no JSON list"));
    let no_number = of("[{\"Prompt\": \"p\", \"Explanation\": \"e\"}]");
    assert!(no_number.contains("suite.json") && no_number.contains("prompt_id"), "{no_number}");
    assert!(of(&format!("[{},{{\"Prompt\": \" \"}}]", wise(1, "x"))).contains("entry 2"));
    assert!(of(&format!("[{}]", wise(1001, "x"))).contains("1 to 1000"));
    assert!(of("[]").contains("neither"));
    assert!(said(&[PathBuf::from("no/such.json")], &[]).contains("no/such.json"));
    let (a, b) = (
        files.put("a.json", &format!("[{}]", wise(1, "x"))),
        files.put("b.jsonl", "{\"prompt\": \"a\"}"),
    );
    assert!(said(&[a, b.clone()], &[]).contains("the files before of WISE"));
    assert!(said(&[b], &[files.put("q.json", "[]")]).contains("only T2I-ReasonBench"));
    assert!(Roles::new(Format::Wise, &["beauty=x".to_owned()]).is_err());
    assert!(Roles::new(Format::Duet, &["a=b".to_owned()]).is_err());
}
