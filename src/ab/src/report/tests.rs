use super::*;
use crate::link::LinkOptions;
use crate::quality::{DifferenceSummary, EngineResult};
use crate::record::append;
use crate::summary::tests::{record, scenario};

fn measured() -> Measured {
    Measured { records: records(), evaluations: vec![evaluation()] }
}

fn records() -> Vec<Record> {
    let mut records = Vec::new();
    for rtt_ms in [1.0, 20.0] {
        let link = Some(LinkOptions { rtt_ms, ..LinkOptions::default() });
        let s = Scenario { link, model: "a<b".into(), ..scenario() };
        for round in 0..=2 {
            records.push(record(&s, Arm::Split, round, 30.0 + rtt_ms + f64::from(round)));
            records.push(record(&s, Arm::Solo, round, 30.0 + f64::from(round)));
        }
    }
    records[1].not_counted = Some("ended by signal 9".into());
    records
}

fn evaluation() -> Evaluation {
    let difference = DifferenceSummary {
        rows: 99,
        kl_mean: 1.5e-6,
        kl_max: 2e-5,
        kl_p99: 1e-5,
        top1: 0.995,
        max_abs: 0.01,
        mean_abs: 0.001,
        equal_rows: 0,
    };
    let engine = |name: &str, difference| EngineResult {
        name: name.into(),
        rows: 99,
        perplexity: 12.5,
        perplexity_error: 0.3,
        tok_s: 40.0,
        difference,
    };
    let exact = DifferenceSummary { max_abs: 0.0, equal_rows: 99, ..difference };
    Evaluation {
        date: "2026-11-22T10:00:00Z".into(),
        model: "demo".into(),
        tokens: 100,
        window: 512,
        engines: vec![
            engine("stock", None),
            engine("split f16", Some(difference)),
            engine("split f32", Some(exact)),
        ],
        machine: records()[0].machine.clone(),
    }
}

#[test]
fn a_page_stands_alone_and_shows_everything() {
    let html = Page::new(&measured()).html();
    for text in [
        "a&lt;b",
        "ended by signal 9",
        "1000 / 750 B",
        "over a link of 20 ms",
        "speed against round-trip time",
    ] {
        assert!(html.contains(text), "no {text:?}");
    }
    assert!(!html.contains("a<b"), "a name got in as markup");
    let outside = html.matches("http").count() - html.matches("http://www.w3.org").count();
    assert_eq!(outside, 0, "the page fetches something");
    // two tables with a plot of speeds and one of times, and one plot over both
    assert_eq!(html.matches("<svg").count(), 5);
}

#[test]
fn the_same_records_give_the_same_report_from_files_too() {
    let dir = tempfile::tempdir().unwrap();
    for (i, record) in records().iter().enumerate() {
        append(&dir.path().join(if i < 6 { "1.jsonl" } else { "2.jsonl" }), record).unwrap();
    }
    std::fs::write(dir.path().join("demo.eval.json"), serde_json::to_string(&evaluation()).unwrap()).unwrap();
    let page = Page::new(&read_all(dir.path()).unwrap());
    assert!(page.html() == Page::new(&measured()).html(), "the page differs");
    page.write(dir.path()).unwrap();
    let markdown = std::fs::read_to_string(dir.path().join("report.md")).unwrap();
    for chart in page.charts() {
        assert!(markdown.contains(&format!("charts/{}.svg", chart.name)));
        assert!(dir.path().join(format!("charts/{}.svg", chart.name)).is_file());
    }
}

#[test]
fn a_broken_line_is_named_and_a_cut_off_one_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.jsonl");
    append(&file, &records()[0]).unwrap();
    let whole = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{whole}{}", &whole[..100])).unwrap();
    assert_eq!(read(&file).unwrap().len(), 1);
    std::fs::write(&file, format!("{whole}{{\"schema\":1}}\n")).unwrap();
    assert!(read(&file).unwrap_err().to_string().contains("line 2"));
    std::fs::write(&file, "{\"schema\":99}\n").unwrap();
    assert!(matches!(read(&file), Err(RecordError::Newer { schema: 99, .. })));
}

#[test]
fn a_document_keeps_what_is_not_generated() {
    let document = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
    let new = insert(&document, "new\n").unwrap();
    assert_eq!(new, format!("before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"));
    assert_eq!(insert(&new, "new").unwrap(), new, "twice is the same as once");
    assert_eq!(insert("no marks", "new"), None);
}

#[test]
fn a_column_that_says_nothing_is_left_out() {
    let markdown = Page::new(&measured()).markdown(2, "charts");
    assert!(markdown.contains("| wire per token, up / down |"), "{markdown}");
    assert!(!markdown.contains("energy per token"), "nothing told the energy");
}

#[test]
fn bytes_are_shown_in_powers_of_ten() {
    for (bytes, text) in
        [(999, "999 B"), (7_168, "7.17 kB"), (180_000_000, "180 MB"), (15_200_000_000, "15.2 GB")]
    {
        assert_eq!(gigabytes(bytes), text);
    }
}
