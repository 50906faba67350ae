//! `deploy/` against the programs and against itself: flags, configuration keys, files and values
//! that it names exist. Rendering the chart and linting scripts needs tools: `make deploy-check`.

use duet_tests::{Run, bin, root, text, wait_until};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every file below a folder of the repository.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![root().join(folder)];
    while let Some(path) = todo.pop() {
        match std::fs::read_dir(&path) {
            Ok(entries) => todo.extend(entries.flatten().map(|entry| entry.path())),
            Err(_) => found.push(path),
        }
    }
    found.sort();
    found
}

fn words(text: &str, belongs: fn(char) -> bool) -> impl Iterator<Item = &str> {
    text.split(move |c| !belongs(c)).filter(|word| !word.is_empty())
}

fn duet(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(bin("duet"));
    command.current_dir(root()).args(args).envs(env.iter().copied());
    command.output().expect("duet starts")
}

#[test]
fn the_configurations_have_the_papers_settings() {
    for gpus in ["8", "64"] {
        let path = format!("configs/qwen-image-{gpus}gpu.toml");
        let out = duet(&["config", &path], &[]);
        assert!(out.status.success(), "{path}: {}", text(&out));
        let whole = text(&out);
        for line in [
            "traces = 5",
            "images_per_trace = 16",
            "steps = 10",
            "len = 2",
            "guidance_scale = 4.0",
            "rank = 64",
            "alpha = 128.0",
            "device = \"cuda\"",
        ] {
            assert!(whole.lines().any(|has| has == line), "{path}: no line `{line}` in {whole}");
        }
    }
}

#[test]
fn every_configuration_key_in_the_environment_exists() {
    let mut names = BTreeSet::new();
    for path in files("deploy") {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let named = words(&text, |c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
        names.extend(named.filter(|word| word.starts_with("DUET__")).map(str::to_owned));
    }
    // The chart's own `DUET__` and key of a value.
    names.retain(|name| name != "DUET__");
    assert!(names.len() >= 9, "{names:?}");
    let refused = |name: &str| {
        let said = text(&duet(&["config", "configs/qwen-image-64gpu.toml"], &[(name, "1")]));
        said.contains("there is no such key")
    };
    for name in &names {
        assert!(!refused(name), "{name} is no key");
    }
    assert!(refused("DUET__RUN__STOREY"), "a wrong key is not noticed");
}

/// The lines of a file, those that end in a backslash joined with the next.
fn commands(text: &str) -> Vec<String> {
    text.replace("\\\n", " ").lines().map(str::to_owned).collect()
}

#[test]
fn every_flag_exists() {
    let help = |program: &str| {
        let mut command = Command::new(bin(program));
        if program.ends_with("worker") || program == "duet-trainer" {
            command.arg("run");
        }
        text(&command.arg("--help").output().expect("it starts"))
    };
    let coordinator = help("duet-coordinator");
    let workers = ["duet-rollout-worker", "duet-reward-worker", "duet-trainer"].map(help);
    let is_flag = |c: char| c.is_ascii_lowercase() || c == '-';
    let has = |help: &str, flag: &str| words(help, is_flag).any(|word| word == flag);
    let mut checked = 0;
    for path in files("deploy/slurm").into_iter().chain(files("deploy/systemd")) {
        for line in commands(&std::fs::read_to_string(&path).expect("text")) {
            let line = line.trim();
            let helps: Vec<&String> =
                if line.starts_with("duet-coordinator") || line.contains("/duet-coordinator ") {
                    vec![&coordinator]
                } else if line.starts_with("\"$program\" run") || line.contains(" run --config") {
                    workers.iter().collect()
                } else {
                    continue;
                };
            for flag in words(line, is_flag).filter(|word| word.starts_with("--")) {
                for help in &helps {
                    assert!(has(help, flag), "{}: {flag} is no flag", path.display());
                }
                checked += 1;
            }
        }
    }
    let chart = read("deploy/helm/duet/templates/_job.tpl");
    for flag in words(&chart, is_flag).filter(|word| word.len() > 3 && word.starts_with("--")) {
        let known = has(&coordinator, flag) || workers.iter().all(|help| has(help, flag));
        assert!(known, "the chart: {flag} is no flag");
        checked += 1;
    }
    assert!(checked >= 20, "only {checked} flags were found: is this test reading the files?");
}

#[test]
fn every_command_of_duet_exists() {
    let help = text(&duet(&["--help"], &[]));
    let mut checked = 0;
    for path in files("deploy") {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        for (at, _) in text.match_indices("duet ") {
            let before = text[..at].chars().next_back().unwrap_or(' ');
            let command = text[at + 5..].split(|c: char| !c.is_ascii_lowercase()).next();
            let Some(command) = command.filter(|word| !word.is_empty()) else { continue };
            if !matches!(before, '(' | '`' | ' ' | '\n') || path.ends_with("Chart.yaml") {
                continue;
            }
            if ["status", "stop", "drain", "config", "launch", "pause", "plan", "certs"]
                .contains(&command)
            {
                assert!(help.contains(&format!("\n  {command}")), "{}: {command}", path.display());
                checked += 1;
            }
        }
    }
    assert!(checked >= 5, "{checked}");
}

/// `section.key` and `key` of the chart's values, from their indentation.
fn values() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut section = String::new();
    for line in read("deploy/helm/duet/values.yaml").lines() {
        let Some((key, rest)) = line.split_once(':') else { continue };
        let plain = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric());
        if let Some(inner) = key.strip_prefix("  ").filter(|inner| plain(inner)) {
            found.insert(format!("{section}.{inner}"));
        } else if plain(key) {
            section = key.to_owned();
            if !rest.trim().is_empty() {
                found.insert(section.clone());
            }
        }
    }
    found
}

#[test]
fn templates_use_every_value_and_no_other() {
    const ROLES: [&str; 4] = ["coordinator", "trainer", "rollout", "reward"];
    let mut used = BTreeSet::new();
    let mut of_roles = BTreeSet::new();
    for path in files("deploy/helm/duet/templates") {
        let text = std::fs::read_to_string(&path).expect("text");
        for word in words(&text, |c| c.is_ascii_alphanumeric() || c == '.' || c == '$') {
            let word = word.trim_start_matches('$').trim_end_matches('.');
            if let Some((_, value)) = word.split_once(".Values.") {
                used.insert(value.to_owned());
            } else if let Some(value) =
                word.strip_prefix(".values.").or(word.strip_prefix("values."))
            {
                of_roles.insert(value.to_owned());
            }
        }
    }
    let has = values();
    for value in &used {
        let section = has.iter().any(|key| key.starts_with(&format!("{value}.")));
        assert!(has.contains(value) || section, "templates use {value}, which has no value");
    }
    for key in &has {
        let (section, inner) = key.split_once('.').unwrap_or((key, ""));
        let by_role = ROLES.contains(&section) && of_roles.contains(inner);
        assert!(used.contains(key) || by_role, "no template uses {key}");
    }
    for inner in &of_roles {
        let known = ROLES.iter().any(|role| has.contains(&format!("{role}.{inner}")));
        assert!(known, "templates use {inner} of a role, which no role has");
    }
}

#[test]
fn the_schema_describes_every_value_and_lets_no_other_in() {
    let schema: Value =
        serde_json::from_str(&read("deploy/helm/duet/values.schema.json")).expect("JSON");
    let mut described = BTreeSet::new();
    for (key, inner) in schema["properties"].as_object().expect("properties") {
        match inner["properties"].as_object() {
            Some(properties) => {
                assert_eq!(inner["additionalProperties"], false, "{key}");
                described.extend(properties.keys().map(|name| format!("{key}.{name}")));
            }
            // What Helm itself adds.
            None if key == "global" => {}
            None => {
                described.insert(key.clone());
            }
        }
    }
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(described, values());
}

#[test]
fn images_copy_what_exists_and_run_as_nobody() {
    for name in ["gpu", "coordinator"] {
        let file = read(&format!("deploy/images/{name}.Dockerfile"));
        let mut stages = BTreeSet::new();
        let mut user = String::new();
        for line in commands(&file) {
            let parts: Vec<&str> = line.split_whitespace().collect();
            match parts[..] {
                ["FROM", base, ref rest @ ..] => {
                    assert!(["${BASE}", "${RUST}"].contains(&base), "{name}: {base} is not pinned");
                    user.clear();
                    stages.extend(rest.get(1).map(|stage| (*stage).to_owned()));
                }
                ["COPY", ref rest @ ..] => {
                    let from = rest.iter().find_map(|part| part.strip_prefix("--from="));
                    if let Some(stage) = from {
                        assert!(stages.contains(stage), "{name}: no stage {stage}");
                        continue;
                    }
                    let paths: Vec<_> = rest.iter().filter(|p| !p.starts_with("--")).collect();
                    for path in &paths[..paths.len() - 1] {
                        assert!(root().join(path).exists(), "{name}: no {path} to copy");
                    }
                }
                ["USER", who] => who.clone_into(&mut user),
                _ => {}
            }
        }
        assert_eq!(user, "65532:65532", "{name}");
        assert!(file.contains("\nHEALTHCHECK "), "{name}");
    }
    let wheels = read("deploy/images/torch-cu130.txt");
    let pins: Vec<&str> = wheels.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(pins.iter().all(|line| line.contains("==") && line.contains(" --hash=sha256:")));
    let setup = read("scripts/libtorch.py");
    let version = setup.lines().find_map(|line| line.strip_prefix("VERSION = \"")).expect("it");
    let torch = format!("torch=={} ", version.trim_end_matches('"'));
    assert!(pins.iter().any(|line| line.starts_with(&torch)), "not the {torch}of make setup");
}

#[test]
fn images_are_built_from_digests_only() {
    let tags = Command::new("bash")
        .arg(root().join("deploy/images/build.sh"))
        .args(["gpu", "duet-gpu"])
        .envs([("RUST", "rust:1.90"), ("BASE", "nvidia/cuda:13.0.1-base-ubuntu24.04")])
        .output()
        .expect("bash starts");
    assert_eq!(tags.status.code(), Some(64), "{}", text(&tags));
    assert!(text(&tags).contains("RUST=rust:1.90 is not a digest"), "{}", text(&tags));
}

#[test]
fn scripts_parse() {
    for (shell, name) in [
        ("sh", "deploy/images/duet-node"),
        ("bash", "deploy/images/build.sh"),
        ("bash", "deploy/slurm/duet.sbatch"),
        ("bash", "deploy/slurm/task.sh"),
    ] {
        let out = Command::new(shell).arg("-n").arg(root().join(name)).output().expect("a shell");
        assert!(out.status.success(), "{name}: {}", text(&out));
    }
}

/// `duet-node`, with `duet` on its path and a folder of its own for its mark.
fn node(folder: &Path) -> Command {
    let programs = bin("duet").parent().expect("a folder").to_path_buf();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("sh");
    command.arg(root().join("deploy/images/duet-node"));
    command.env("PATH", format!("{}:{path}", programs.display())).env("TMPDIR", folder);
    for variable in PLACES {
        command.env_remove(variable);
    }
    command.env("JOB_COMPLETION_INDEX", "0");
    command
}

/// Variables that say which worker a process is, and of how many.
const PLACES: [&str; 14] = [
    "DUET_RANK",
    "DUET_LOCAL_RANK",
    "DUET_WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "PET_NODE_RANK",
    "PET_NPROC_PER_NODE",
    "JOB_COMPLETION_INDEX",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "LWS_WORKER_INDEX",
    "LWS_GROUP_SIZE",
    "LWS_LEADER_ADDRESS",
];

/// The variable that decides, what a launcher puts into the environment, and the number it means.
type Launcher = (&'static str, &'static [(&'static str, &'static str)], u32);

const LAUNCHERS: [Launcher; 7] = [
    ("DUET_RANK", &[("DUET_RANK", "3"), ("RANK", "1"), ("SLURM_PROCID", "9")], 3),
    ("RANK", &[("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8"), ("PET_NODE_RANK", "2")], 5),
    ("PET_NODE_RANK", &[("PET_NODE_RANK", "2"), ("JOB_COMPLETION_INDEX", "0")], 2),
    ("JOB_COMPLETION_INDEX", &[("JOB_COMPLETION_INDEX", "4"), ("LWS_WORKER_INDEX", "1")], 4),
    ("SLURM_PROCID", &[("SLURM_PROCID", "7"), ("SLURM_LOCALID", "3")], 7),
    (
        "LWS_WORKER_INDEX",
        &[
            ("LWS_WORKER_INDEX", "2"),
            ("LWS_GROUP_SIZE", "4"),
            ("LWS_LEADER_ADDRESS", "my-set-3.my-set.default"),
        ],
        14,
    ),
    ("LWS_WORKER_INDEX", &[("LWS_WORKER_INDEX", "1")], 1),
];

#[test]
fn a_worker_and_its_probes_take_its_name_from_the_launcher() {
    let folder = tempfile::tempdir().expect("a folder");
    let workers = [
        ("rollout", "duet-rollout-worker"),
        ("reward", "duet-reward-worker"),
        ("trainer", "duet-trainer"),
    ];
    let run = |program: &str, env: &[(&str, &str)]| {
        let mut command = Command::new(bin(program));
        for variable in PLACES {
            command.env_remove(variable);
        }
        // It says who it is before it misses its configuration.
        command.args(["run", "--config", "/nowhere.toml", "--coordinator", "http://127.0.0.1:1"]);
        command.env("DUET_LOG_FORMAT", "json").envs(env.iter().copied());
        command.output().expect("it starts")
    };
    for (by, env, rank) in LAUNCHERS {
        for (role, program) in workers {
            let name = format!("{role}-{rank}");
            let probes = node(folder.path())
                .env_remove("JOB_COMPLETION_INDEX")
                .envs(env.iter().copied())
                .args(["name", role])
                .output()
                .expect("it starts");
            assert_eq!(text(&probes).trim(), name, "{env:?}");
            let out = run(program, env);
            assert_eq!(out.status.code(), Some(74), "{}", text(&out));
            let said = text(&out);
            let place = said.lines().find(|line| line.contains("\"place\"")).expect("its place");
            let place: Value = serde_json::from_str(place).expect("JSON");
            let whole = place.to_string();
            assert!(whole.contains(&format!("\"worker\":\"{name}\"")), "{whole}");
            assert!(whole.contains(&format!("\"rank_by\":\"{by}\"")), "{whole}");
        }
    }
    for (_, program) in workers {
        let nobody = run(program, &[]);
        assert_eq!(nobody.status.code(), Some(64), "{}", text(&nobody));
        assert!(text(&nobody).contains("give --id or --rank"), "{}", text(&nobody));
        let beyond = run(program, &[("RANK", "8"), ("WORLD_SIZE", "8")]);
        assert_eq!(beyond.status.code(), Some(78), "{}", text(&beyond));
        assert!(text(&beyond).contains("RANK=8, but WORLD_SIZE=8"), "{}", text(&beyond));
    }
}

fn terminate(child: &Child) {
    let sent = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(sent.expect("kill starts").success());
}

#[test]
fn a_process_that_ends_by_itself_keeps_its_exit_code() {
    let folder = tempfile::tempdir().expect("a folder");
    for code in [0, 1, 75, 78] {
        let out = node(folder.path()).args(["run", "sh", "-c", &format!("exit {code}")]).output();
        assert_eq!(out.expect("it starts").status.code(), Some(code));
    }
    let drained = format!(": >{}/duet-node.drained", folder.path().display());
    let out = node(folder.path()).args(["run", "sh", "-c", &drained]).output().expect("it starts");
    assert_eq!(out.status.code(), Some(143), "drained in the middle of a run");
}

#[test]
fn a_coordinator_that_is_sent_away_says_so_and_its_worker_is_not_blamed() {
    let folder = tempfile::tempdir().expect("a folder");
    let prompts = folder.path().join("prompts.jsonl");
    std::fs::write(&prompts, "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n").expect("written");
    let ready = folder.path().join("address");
    let log = std::fs::File::create(folder.path().join("log")).expect("a log");
    let mut child = node(folder.path())
        .args(["run", "duet-coordinator", "--resume", "--config"])
        .arg(root().join("configs/test.toml"))
        .arg("--ready-file")
        .arg(&ready)
        .args(["--set", &format!("run.store=\"{}\"", folder.path().join("run").display())])
        .args(["--set", &format!("data.prompts=\"{}\"", prompts.display())])
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("it starts");
    wait_until("the coordinator's address", || {
        assert!(child.try_wait().expect("its status").is_none(), "it ended early");
        ready.metadata().is_ok_and(|file| file.len() > 0)
    });
    let address = std::fs::read_to_string(&ready).expect("an address");
    let ask = |what: &str| {
        let out = node(folder.path()).args([what, address.trim(), "rollout"]).output();
        out.expect("it starts").status.code()
    };
    assert_eq!(ask("ready"), Some(1), "nobody has registered");
    assert_eq!(ask("alive"), Some(0), "a worker that still loads its model");
    terminate(&child);
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    assert_eq!(child.wait().expect("its end").code(), Some(143), "{}", log());
    assert_eq!(ask("ready"), Some(1), "no coordinator");
    assert_eq!(ask("alive"), Some(0), "no coordinator, but that is not the worker's fault");
}

#[test]
fn a_registered_worker_is_ready_and_is_drained() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Run::new(folder.path(), &["workers.rollout=1"]);
    let mut child = run.start();
    run.wait_for_iterations(&mut child, 1);
    let address = std::fs::read_to_string(run.store.join("coordinator.addr")).expect("an address");
    let ask = |what: &str, role: &str| {
        let out = node(folder.path()).args([what, address.trim(), role]).output();
        out.expect("it starts").status.code()
    };
    assert_eq!(ask("ready", "trainer"), Some(0));
    assert_eq!(ask("ready", "rolloutx"), Some(1));
    assert_eq!(ask("drain", "reward"), Some(0));
    assert!(folder.path().join("duet-node.drained").exists());
    assert_eq!(ask("ready", "reward"), Some(1), "it was sent home");
    child.kill().expect("SIGKILL");
    child.wait().expect("its end");
}
