//! From records to what a table says: one table per scenario, one row per arm.

use crate::machine::{Machine, Versions};
use crate::record::{Arm, Phase, Record, Scenario};
use crate::stats::{Ratio, Summary};

/// All records of one scenario on one machine.
#[derive(Clone, Debug)]
pub struct Table {
    /// What the arms had in common.
    pub scenario: Scenario,
    /// Where they ran.
    pub machine: Machine,
    /// What ran.
    pub versions: Versions,
    /// The first and the last day, as `2026-01-31`.
    pub days: (String, String),
    /// The arms, in the order of [`Arm`].
    pub rows: Vec<Row>,
    /// The arm that the others are compared with, if it was measured.
    pub base: Option<Arm>,
}

/// What is known of one arm.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which.
    pub arm: Arm,
    /// Bytes of its model files on the host.
    pub model_bytes: u64,
    /// Steady rounds that count.
    pub rounds: usize,
    /// Why the others do not, with their round.
    pub not_counted: Vec<(u32, String)>,
    /// Tokens generated per second.
    pub generation: Option<Summary>,
    /// The generation's ratio to the base arm's.
    pub generation_ratio: Option<Ratio>,
    /// Prompt tokens per second.
    pub prompt: Option<Summary>,
    /// The prompt's ratio to the base arm's.
    pub prompt_ratio: Option<Ratio>,
    /// From a cold start to the first token, in seconds.
    pub first_token_s: Option<Summary>,
    /// Most memory mapped to the host process, in bytes.
    pub peak_rss_bytes: Option<u64>,
    /// Most memory of its own, in bytes.
    pub peak_own_bytes: Option<u64>,
    /// Most memory of its group, page cache included.
    pub group_peak_bytes: Option<u64>,
    /// Major page faults of a steady round.
    pub major_faults: Option<Summary>,
    /// Bytes the disk read in a steady round.
    pub disk_read_bytes: Option<Summary>,
    /// Bytes on the wire per generated token: up, down.
    pub wire_per_token: Option<(f64, f64)>,
    /// Bytes on the wire from the start to the end of a first load: up, down.
    pub wire_first_load: Option<(u64, u64)>,
    /// Joules of the machine per token of a steady round, the prompt's included.
    pub joules_per_token: Option<Summary>,
    /// How its tokens compare with stock's on the same file.
    pub same: Same,
    /// Where a generated token's time goes.
    pub breakdown: Option<Breakdown>,
}

/// Whether an arm gave the tokens of stock llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Same {
    /// It is the one compared with, or nothing was there to compare with, or it computes another model.
    NotCompared,
    /// In every round.
    Yes,
    /// From this token on (of so many) it went another way in at least one round.
    Until(usize, usize),
}

/// A generated token's time, in milliseconds, medians over the steady rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Breakdown {
    /// Names and times: each stage's computing, each worker's wire and waiting, choosing the token.
    pub parts: Vec<(String, f64)>,
    /// What was measured as a whole.
    pub total_ms: f64,
}

impl Breakdown {
    /// The part of the whole that the parts do not explain; negative where they say more than there is.
    pub fn unexplained(&self) -> f64 {
        1.0 - self.parts.iter().map(|(_, ms)| ms).sum::<f64>() / self.total_ms
    }
}

/// Groups records and sums them up. Scenarios come in the order of their first record.
pub fn summarise(records: &[Record]) -> Vec<Table> {
    let mut groups: Vec<Vec<&Record>> = Vec::new();
    for record in records {
        let found =
            groups.iter_mut().find(|g| g[0].scenario == record.scenario && g[0].machine == record.machine);
        match found {
            Some(group) => group.push(record),
            None => groups.push(vec![record]),
        }
    }
    groups.iter().map(|group| table(group)).collect()
}

fn table(records: &[&Record]) -> Table {
    let mut arms: Vec<Arm> = records.iter().map(|r| r.arm).collect();
    arms.sort();
    arms.dedup();
    let of = |arm: Arm| -> Vec<&Record> { records.iter().copied().filter(|r| r.arm == arm).collect() };
    let has_steady = |arm: &Arm| of(*arm).iter().any(|r| r.counts() && r.phase == Phase::Steady);
    let base = [Arm::Solo, Arm::SoloUnlimited].into_iter().find(has_steady);
    let reference = [Arm::Solo, Arm::SoloUnlimited].into_iter().find_map(|arm| {
        let tokens =
            of(arm).into_iter().filter(|r| r.counts()).find_map(|r| Some(&r.report.as_ref()?.tokens))?;
        Some((arm, tokens.clone()))
    });
    let base_records = base.map(of).unwrap_or_default();
    let rows = arms.iter().map(|&arm| row(arm, &of(arm), base, &base_records, reference.as_ref())).collect();
    let day = |r: &&Record| r.date.chars().take(10).collect::<String>();
    let mut days: Vec<String> = records.iter().map(day).collect();
    days.sort();
    Table {
        scenario: records[0].scenario.clone(),
        machine: records[0].machine.clone(),
        versions: records[0].versions.clone(),
        days: (days.first().cloned().unwrap_or_default(), days.last().cloned().unwrap_or_default()),
        rows,
        base,
    }
}

fn row(
    arm: Arm,
    records: &[&Record],
    base: Option<Arm>,
    base_records: &[&Record],
    reference: Option<&(Arm, Vec<i32>)>,
) -> Row {
    let counted: Vec<&Record> = records.iter().copied().filter(|r| r.counts()).collect();
    let steady: Vec<&Record> = counted.iter().copied().filter(|r| r.phase == Phase::Steady).collect();
    let first: Vec<&Record> = counted.iter().copied().filter(|r| r.phase == Phase::First).collect();
    let summary = |records: &[&Record], f: &dyn Fn(&Record) -> Option<f64>| {
        Summary::of(records.iter().filter_map(|r| f(r)))
    };
    let generation = |r: &Record| r.report.as_ref().map(|r| r.gen_tok_s).filter(|&v| v > 0.0);
    let prompt = |r: &Record| r.report.as_ref().map(|r| r.prompt_tok_s).filter(|&v| v > 0.0);
    let ratio = |f: &dyn Fn(&Record) -> Option<f64>| {
        if base.is_none() || base == Some(arm) {
            return None;
        }
        // rounds that count in both come first and stay together
        let base_steady = base_records.iter().filter(|r| r.counts() && r.phase == Phase::Steady);
        let b: Vec<(u32, f64)> = base_steady.filter_map(|r| Some((r.round, f(r)?))).collect();
        let a: Vec<(u32, f64)> = steady.iter().filter_map(|r| Some((r.round, f(r)?))).collect();
        let values = |list: &[(u32, f64)]| list.iter().map(|(_, v)| *v).collect::<Vec<f64>>();
        Ratio::of(&values(&a), &values(&b), BOOTSTRAP_SEED)
    };
    let most = |f: &dyn Fn(&Record) -> Option<u64>| counted.iter().filter_map(|r| f(r)).max();
    let wire_per_token = steady.iter().find_map(|r| {
        let report = r.report.as_ref()?;
        let steps = report.tokens.len().checked_sub(1).filter(|&n| n > 0)? as f64;
        (report.wire.round_trips > 0).then(|| {
            (report.wire.gen_bytes_sent as f64 / steps, report.wire.gen_bytes_received as f64 / steps)
        })
    });
    // the link counts every arm's bytes with the same instrument; without one, only the split knows its own
    let wire_first_load = first.iter().find_map(|r| {
        let report = r.report.as_ref()?;
        let own =
            (report.wire.round_trips > 0).then_some((report.wire.bytes_sent, report.wire.bytes_received));
        r.link_traffic.map(|t| (t.bytes_up, t.bytes_down)).or(own)
    });
    let joules = |r: &Record| {
        let report = r.report.as_ref()?;
        let tokens = report.tokens.len() + report.prompt_tokens;
        Some(r.energy.as_ref()?.joules / tokens.max(1) as f64)
    };
    Row {
        arm,
        model_bytes: records.first().map_or(0, |r| r.model.bytes),
        rounds: steady.len(),
        not_counted: records.iter().filter_map(|r| Some((r.round, r.not_counted.clone()?))).collect(),
        generation: summary(&steady, &generation),
        generation_ratio: ratio(&generation),
        prompt: summary(&steady, &prompt),
        prompt_ratio: ratio(&prompt),
        first_token_s: summary(&first, &|r| Some(r.report.as_ref()?.start_to_first_token_ms / 1e3)),
        peak_rss_bytes: most(&|r| r.host.peak_rss_bytes),
        peak_own_bytes: most(&|r| r.host.peak_own_bytes),
        group_peak_bytes: most(&|r| r.host_group_peak_bytes),
        major_faults: summary(&steady, &|r| r.host.major_faults.map(|n| n as f64)),
        disk_read_bytes: summary(&steady, &|r| r.host.disk_read_bytes.map(|n| n as f64)),
        wire_per_token,
        wire_first_load,
        joules_per_token: summary(&steady, &joules),
        same: same(arm, &counted, reference),
        breakdown: breakdown(&steady),
    }
}

fn same(arm: Arm, counted: &[&Record], reference: Option<&(Arm, Vec<i32>)>) -> Same {
    let Some((stock, expected)) = reference else { return Same::NotCompared };
    if arm == *stock || !arm.computes_the_model() || counted.is_empty() {
        return Same::NotCompared;
    }
    let first_difference = |record: &&Record| {
        let tokens = &record.report.as_ref()?.tokens;
        let differs = tokens.iter().zip(expected).position(|(a, b)| a != b);
        differs.or_else(|| (tokens.len() != expected.len()).then(|| tokens.len().min(expected.len())))
    };
    match counted.iter().filter_map(first_difference).min() {
        None => Same::Yes,
        Some(at) => Same::Until(at, expected.len()),
    }
}

/// Medians over rounds, part for part; the rounds of an arm have the same parts.
fn breakdown(steady: &[&Record]) -> Option<Breakdown> {
    let rounds: Vec<Breakdown> = steady.iter().filter_map(|r| one_breakdown(r)).collect();
    let names: Vec<String> = rounds.first()?.parts.iter().map(|(name, _)| name.clone()).collect();
    // of the round whose speed is the median: parts of different rounds do not add up to anything
    let mut order: Vec<&Breakdown> = rounds.iter().filter(|b| b.parts.len() == names.len()).collect();
    order.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms));
    order.get(order.len() / 2).map(|b| (*b).clone())
}

fn one_breakdown(record: &Record) -> Option<Breakdown> {
    let report = record.report.as_ref()?;
    let steps = report.tokens.len().checked_sub(1).filter(|&n| n > 0)? as f64;
    let mut parts = Vec::new();
    for stage in &report.stages {
        // `middle at 127.0.0.1:7878` is told apart by its blocks, not by a port that changes
        let name = stage.name.split_whitespace().next().unwrap_or(&stage.name);
        parts.push((format!("{name} {}", stage.blocks).trim().to_owned(), stage.gen_compute_ms / steps));
        if stage.gen_wait_ms > 0.0 {
            parts.push((format!("wire and wait, {}", stage.blocks), stage.gen_wait_ms / steps));
        }
    }
    // the first token was chosen before the generation's time began
    parts.push(("sampling".to_owned(), report.sample_ms / report.tokens.len() as f64));
    Some(Breakdown { parts, total_ms: report.gen_ms / steps })
}

/// The same records give the same intervals.
const BOOTSTRAP_SEED: u64 = 20_26;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::link::LinkOptions;
    use crate::record::{ModelFile, SCHEMA};
    use crate::usage::Usage;
    use dim::host::report::{Report, StageReport, Stop, WireReport};

    pub(crate) fn scenario() -> Scenario {
        Scenario {
            model: "demo".into(),
            middle: "4..7".into(),
            remote_blocks: 4,
            prompt_tokens: 128,
            n_predict: 5,
            n_ctx: 512,
            threads: 1,
            wire: "f16".into(),
            memory_limit_bytes: None,
            worker_memory_limit_bytes: None,
            link: Some(LinkOptions { rtt_ms: 5.0, rate_mbit_per_s: Some(200.0), ..LinkOptions::default() }),
            host_cpus: vec![0],
            worker_cpus: vec![1],
            local_workers: true,
        }
    }

    /// A record as a run of `ms_per_token` would leave it.
    pub(crate) fn record(scenario: &Scenario, arm: Arm, round: u32, ms_per_token: f64) -> Record {
        let steps = (scenario.n_predict - 1) as f64;
        let stage = |name: &str, blocks: &str, compute: f64, wait: f64| StageReport {
            name: name.into(),
            blocks: blocks.into(),
            compute_ms: compute * steps + 10.0,
            wait_ms: wait * steps,
            gen_compute_ms: compute * steps,
            gen_wait_ms: wait * steps,
            reconnects: 0,
        };
        let split = arm == Arm::Split;
        let stages = if split {
            vec![
                stage("head", "0..3", ms_per_token * 0.3, 0.0),
                stage("middle at 127.0.0.1:4711", "4..7", ms_per_token * 0.3, ms_per_token * 0.1),
                stage("tail", "8..11", ms_per_token * 0.29, 0.0),
            ]
        } else {
            vec![stage("model", "0..11", ms_per_token * 0.99, 0.0)]
        };
        let report = Report {
            mode: if split { "split" } else { "stock" }.into(),
            model: "demo".into(),
            tokens: (0..scenario.n_predict as i32).collect(),
            text: String::new(),
            sampled: false,
            stop: Stop::Length,
            error: None,
            seed: 0,
            prompt_tokens: scenario.prompt_tokens,
            prompt_tok_s: 20e3 / ms_per_token,
            gen_tok_s: 1e3 / ms_per_token,
            ttft_ms: 100.0,
            start_to_first_token_ms: 900.0,
            load_ms: 500.0,
            prompt_ms: 100.0,
            gen_ms: ms_per_token * steps,
            sample_ms: ms_per_token * 0.005 * scenario.n_predict as f64,
            stages,
            wire: WireReport {
                dtype: "f16".into(),
                bytes_sent: if split { 9_000 } else { 0 },
                bytes_received: if split { 8_000 } else { 0 },
                round_trips: if split { 5 } else { 0 },
                gen_bytes_sent: if split { 4_000 } else { 0 },
                gen_bytes_received: if split { 3_000 } else { 0 },
            },
        };
        Record {
            schema: SCHEMA,
            date: "2026-11-22T10:00:00Z".into(),
            arm,
            round,
            phase: if round == 0 { Phase::First } else { Phase::Steady },
            not_counted: None,
            scenario: scenario.clone(),
            model: ModelFile { name: "demo.gguf".into(), bytes: 1_000_000 },
            command: vec!["dim-host".into()],
            report: Some(report),
            host: Usage {
                peak_rss_bytes: Some(200 << 20),
                peak_own_bytes: Some(50 << 20),
                major_faults: Some(3),
                disk_read_bytes: Some(1 << 20),
            },
            host_group_peak_bytes: None,
            workers: vec![],
            link_traffic: None,
            system: Default::default(),
            energy: None,
            cold_cache: round == 0,
            machine: Machine {
                os: "Linux 6".into(),
                cpu: "a processor".into(),
                cores: 2,
                memory_bytes: 8 << 30,
                ..Machine::default()
            },
            versions: Versions { dim: "0.1.0".into(), llama_cpp_sys_2: "1.2.3".into() },
        }
    }

    fn records() -> Vec<Record> {
        let s = scenario();
        let mut records = Vec::new();
        for round in 0..=3 {
            let slow = 1.0 + f64::from(round) * 0.01;
            records.push(record(&s, Arm::Solo, round, 10.0 * slow));
            records.push(record(&s, Arm::Split, round, 12.5 * slow));
        }
        records
    }

    #[test]
    fn arms_are_compared_with_solo_in_the_same_rounds() {
        let tables = summarise(&records());
        assert_eq!(tables.len(), 1);
        let table = &tables[0];
        assert_eq!((table.base, table.rows.len()), (Some(Arm::Solo), 2));
        let split = &table.rows[0];
        assert_eq!((split.arm, split.rounds), (Arm::Split, 3), "the first load is no steady round");
        let ratio = split.generation_ratio.unwrap();
        assert!(
            (ratio.ratio - 0.8).abs() < 1e-9
                && (ratio.low - 0.8).abs() < 1e-9
                && (ratio.high - 0.8).abs() < 1e-9,
            "{ratio:?}"
        );
        assert_eq!(split.first_token_s.unwrap().median, 0.9);
        assert_eq!(split.wire_per_token, Some((1_000.0, 750.0)));
        assert_eq!(split.wire_first_load, Some((9_000, 8_000)));
        assert_eq!(split.same, Same::Yes);
        assert_eq!(table.rows[1].same, Same::NotCompared);
        assert!(table.rows[1].generation_ratio.is_none());
    }

    #[test]
    fn a_marked_round_is_told_and_not_counted() {
        let mut records = records();
        let marked = records.iter_mut().find(|r| r.arm == Arm::Split && r.round == 2).unwrap();
        marked.not_counted = Some("a worker was lost and found again 1x".into());
        marked.report.as_mut().unwrap().gen_tok_s = 1e6;
        let row = &summarise(&records)[0].rows[0];
        assert_eq!(row.rounds, 2);
        assert!(row.generation.unwrap().max < 1e3, "the marked round was counted");
        assert_eq!(row.not_counted, [(2, "a worker was lost and found again 1x".to_owned())]);
    }

    #[test]
    fn another_token_is_seen_wherever_it_is() {
        let mut records = records();
        records.last_mut().unwrap().report.as_mut().unwrap().tokens[3] = 77;
        assert_eq!(summarise(&records)[0].rows[0].same, Same::Until(3, 5));
    }

    #[test]
    fn the_parts_add_up_to_what_was_measured() {
        let breakdown = summarise(&records())[0].rows[0].breakdown.clone().unwrap();
        let names: Vec<&str> = breakdown.parts.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["head 0..3", "middle 4..7", "wire and wait, 4..7", "tail 8..11", "sampling"]);
        assert!(breakdown.unexplained().abs() < 0.01, "{breakdown:?}");
    }

    #[test]
    fn another_link_is_another_table() {
        let mut records = records();
        let other = Scenario { link: None, ..scenario() };
        records.push(record(&other, Arm::Solo, 1, 10.0));
        assert_eq!(summarise(&records).len(), 2);
    }
}
