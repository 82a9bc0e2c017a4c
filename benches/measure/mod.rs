//! What the benches share: taking samples in turns, and a table of what they say.

#![allow(dead_code, reason = "each bench uses its part")]

use std::path::PathBuf;
use std::process::Command;
use std::thread;

/// What a bench prints, in Markdown.
pub struct Table(pub String);

impl Table {
    pub fn new() -> Table {
        Table("| | | |\n|---|---|---|\n".into())
    }

    pub fn row(&mut self, what: &str, value: impl std::fmt::Display, compared: impl std::fmt::Display) {
        eprintln!("{what}: {value}; {compared}");
        self.0 += &format!("| {what} | {value} | {compared} |\n");
    }
}

/// Knuth's MMIX generator.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// Measures each of the jobs, by their numbers, in turns.
pub fn interleave(jobs: usize, rounds: usize, mut measure: impl FnMut(usize) -> f64) -> Vec<Vec<f64>> {
    let mut samples = vec![Vec::new(); jobs];
    let mut order: Vec<usize> = (0..jobs).collect();
    let mut random = Random(1);
    for _ in 0..rounds {
        for n in 1..jobs {
            order.swap(n, random.below(n + 1));
        }
        for &job in &order {
            samples[job].push(measure(job));
        }
    }
    samples.iter_mut().for_each(|samples| samples.sort_by(f64::total_cmp));
    samples
}

/// Of sorted samples.
pub fn quantile(samples: &[f64], part: f64) -> f64 {
    samples[((samples.len() - 1) as f64 * part).round() as usize]
}

pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

pub fn spread(samples: &[f64], digits: usize, unit: &str) -> String {
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|part| quantile(samples, part));
    format!("{middle:.digits$} {unit} ({low:.digits$}–{high:.digits$})")
}

/// One of the programs to compare with, which `make bench` builds.
pub fn baseline(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().nth(2).unwrap().join(name);
    assert!(path.exists(), "{} is missing: run make bench", path.display());
    path
}

/// What it ran on, in one line.
pub fn machine() -> String {
    let first_line = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let line = String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned();
        line.rsplit(": ").next().unwrap_or_default().to_owned()
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(" unknown");
    format!(
        "{} cores ({}), Linux {}, {}, {}, {}",
        thread::available_parallelism().unwrap(),
        model.trim_start_matches(['\t', ' ', ':']),
        first_line("uname", "-r"),
        first_line("memcached", "-V"),
        first_line("/usr/sbin/apache2", "-v"),
        first_line("/usr/sbin/nginx", "-v"),
    )
}
