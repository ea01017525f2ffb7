//! The plots of a report, each a self-contained SVG.

use std::sync::Arc;

use kuva::prelude::{
    BarPlot, Layout, LegendEntry, LegendPosition, LegendShape, LinePlot, LineStyle, Plot, ScatterPlot,
    TickFormat, render_to_svg,
};

use crate::record::{Arm, Scenario};
use crate::stats::Summary;
use crate::summary::{Row, Table};

/// A plot and what it is called.
#[derive(Clone, Debug)]
pub struct Chart {
    /// File name without `.svg`.
    pub name: String,
    /// What it shows, in a sentence.
    pub caption: String,
    /// The picture.
    pub svg: String,
}

impl Chart {
    /// kuva numbers what it clips over the whole life of the process: the number is replaced, so that the same records
    /// give the same picture, and by the name, so that pictures on one page do not share it.
    fn new(name: String, caption: String, svg: &str) -> Chart {
        let mut parts = svg.split("kuva-clip-");
        let mut out = parts.next().unwrap_or("").to_owned();
        let mut seen: Vec<&str> = Vec::new();
        for part in parts {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            let (number, rest) = part.split_at(end);
            let place = seen.iter().position(|s| *s == number).unwrap_or_else(|| {
                seen.push(number);
                seen.len() - 1
            });
            out.push_str(&format!("{name}-clip-{place}{rest}"));
        }
        Chart { name, caption, svg: out }
    }
}

/// Generation speed of every arm, with its slowest and fastest round. `None` without any.
pub fn speeds(table: &Table, name: String) -> Option<Chart> {
    let measured: Vec<(&Row, Summary)> = table.rows.iter().filter_map(|r| Some((r, r.generation?))).collect();
    if measured.is_empty() {
        return None;
    }
    // kuva draws the first bar at the bottom
    let bars = measured.iter().rev().map(|(row, s)| (label(row.arm, s.median), s.median, color(row.arm)));
    let whiskers = measured.iter().rev().map(|(_, s)| (s.median - s.min, s.max - s.median));
    let plot = BarPlot::new()
        .with_colored_bars(bars)
        .with_asymmetric_error(whiskers)
        .with_width(0.6)
        .with_horizontal(true);
    let plots = vec![Plot::Bar(plot)];
    let layout = base(&plots)
        .with_x_label("tokens generated per second")
        .with_height(90.0 + 46.0 * measured.len() as f64);
    Some(Chart::new(
        name,
        "Generation speed: median, and the slowest and the fastest round.".to_owned(),
        &render_to_svg(plots, layout),
    ))
}

/// A generated token's time by stage, for every arm.
pub fn breakdown(table: &Table, name: String) -> Option<Chart> {
    let mut measured: Vec<(&Row, _)> =
        table.rows.iter().filter_map(|r| Some((r, r.breakdown.as_ref()?))).collect();
    // an arm that waits for its disk would leave the others without a width
    let split = measured.iter().find(|(r, _)| r.arm == Arm::Split).map(|(_, b)| b.total_ms);
    let too_long = |total_ms: f64| split.is_some_and(|split| total_ms > 4.0 * split);
    let left_out: Vec<String> = measured
        .iter()
        .filter(|(_, b)| too_long(b.total_ms))
        .map(|(r, b)| format!("{} ({} ms)", r.arm.title(), significant(b.total_ms)))
        .collect();
    measured.retain(|(_, b)| !too_long(b.total_ms));
    if measured.is_empty() {
        return None;
    }
    let kinds = [Kind::Head, Kind::Middle, Kind::Wire, Kind::Tail, Kind::Model, Kind::Sampling, Kind::Rest];
    let share = |kind: Kind, (_, b): &(&Row, &crate::summary::Breakdown)| -> f64 {
        let named: f64 = b.parts.iter().filter(|(name, _)| Kind::of(name) == kind).map(|(_, ms)| ms).sum();
        let rest = b.total_ms - b.parts.iter().map(|(_, ms)| ms).sum::<f64>();
        if kind == Kind::Rest { named + rest.max(0.0) } else { named }
    };
    let used: Vec<Kind> = kinds.into_iter().filter(|&k| measured.iter().any(|m| share(k, m) > 0.0)).collect();
    let mut plot = BarPlot::new().with_width(0.6).with_horizontal(true).with_stacked();
    for m in measured.iter().rev() {
        let name = format!("{} ({})", m.0.arm.title(), significant(m.1.total_ms));
        plot = plot.with_group(name, used.iter().map(|&k| (share(k, m), k.color())).collect::<Vec<_>>());
    }
    let plots = vec![Plot::Bar(plot)];
    let entries = used.iter().map(|k| LegendEntry {
        label: k.title().to_owned(),
        color: k.color().to_owned(),
        shape: LegendShape::Rect,
        dasharray: None,
    });
    let layout = base(&plots)
        .with_x_label("milliseconds per generated token")
        .with_legend_entries(entries.collect())
        .with_legend_position(LegendPosition::OutsideRightTop)
        .with_legend_box(false)
        .with_height((90.0 + 46.0 * measured.len() as f64).max(220.0));
    Some(Chart::new(
        name,
        match left_out.as_slice() {
            [] => "Where a generated token's time goes, in the round of median speed.".to_owned(),
            arms => format!(
                "Where a generated token's time goes, in the round of median speed. Beyond the edge: {}.",
                arms.join(", ")
            ),
        },
        &render_to_svg(plots, layout),
    ))
}

/// The regime plot: speed against the host's memory limit, over tables that differ in nothing else.
pub fn against_memory(tables: &[&Table], name: String) -> Option<Chart> {
    let x = |s: &Scenario| s.memory_limit_bytes.map(|b| b as f64 / 1e9);
    let limited: Vec<&Table> = tables.iter().copied().filter(|t| x(&t.scenario).is_some()).collect();
    let arms = [Arm::Split, Arm::Solo, Arm::Rpc, Arm::Q8_0, Arm::Q4KM];
    let mut plots = lines(&limited, &arms, |s| x(s).unwrap_or(0.0))?;
    // the ceiling knows no limit: one measurement of it holds for all
    if let Some(ceiling) = limited.iter().find_map(|t| generation(t, Arm::SoloUnlimited)) {
        let level = limited.iter().filter_map(|t| Some((x(&t.scenario)?, ceiling.median)));
        plots.push(dashed(level.collect(), Arm::SoloUnlimited.title()));
    }
    let model =
        limited.iter().flat_map(|t| &t.rows).find(|r| r.arm == Arm::Solo).map(|r| r.model_bytes as f64 / 1e9);
    let mut layout = base(&plots).with_x_label("memory limit of the host, GB").with_log_y();
    layout = layout.with_y_tick_format(TickFormat::Custom(Arc::new(|v| format!("{v}"))));
    if let Some(bytes) = model {
        layout = layout.with_subtitle(format!("the model's file has {bytes:.1} GB"));
    }
    let layout = finish(layout);
    Some(Chart::new(name, "Generation speed against the host's memory: where the file does not fit, every token reads it from the disk again."
            .to_owned(), &render_to_svg(plots, layout)))
}

/// Speed against the link's round trip, over tables that differ in nothing else, with the bound that no split of one
/// sequence can exceed: 1 / (1 / solo + round trip).
pub fn against_round_trip(tables: &[&Table], name: String) -> Option<Chart> {
    let x = |s: &Scenario| s.link.map(|l| l.rtt_ms);
    let mut linked: Vec<&Table> = tables.iter().copied().filter(|t| x(&t.scenario).is_some()).collect();
    linked.sort_by(|a, b| x(&a.scenario).partial_cmp(&x(&b.scenario)).unwrap_or(std::cmp::Ordering::Equal));
    let mut plots =
        lines(&linked, &[Arm::Split, Arm::Rpc, Arm::Solo, Arm::SoloUnlimited], |s| x(s).unwrap_or(0.0))?;
    let solo = |t: &Table| generation(t, Arm::SoloUnlimited).or_else(|| generation(t, Arm::Solo));
    let bound: Vec<(f64, f64)> = linked
        .iter()
        .filter_map(|t| {
            let (rtt_ms, solo) = (x(&t.scenario)?, solo(t)?);
            Some((rtt_ms, 1e3 / (1e3 / solo.median + rtt_ms)))
        })
        .collect();
    if bound.len() >= 2 {
        plots.push(dashed(bound, "bound: solo plus one round trip"));
    }
    let layout = base(&plots).with_x_label("round trip of the link, ms").with_y_axis_min(0.0);
    let layout = finish(layout);
    Some(Chart::new(
        name,
        "Generation speed against the link's round trip.".to_owned(),
        &render_to_svg(plots, layout),
    ))
}

/// An arm's generation speed, where it was measured.
fn generation(table: &Table, arm: Arm) -> Option<Summary> {
    table.rows.iter().find(|r| r.arm == arm)?.generation
}

/// What the others are held against.
fn dashed(points: Vec<(f64, f64)>, legend: &str) -> Plot {
    let line = LinePlot::new().with_data(points).with_color(GRAY).with_line_style(LineStyle::Dashed);
    Plot::Line(line.with_legend(legend))
}

/// A line with whiskers for each arm that was measured at two or more values of `x`.
fn lines(tables: &[&Table], arms: &[Arm], x: impl Fn(&Scenario) -> f64) -> Option<Vec<Plot>> {
    let mut plots = Vec::new();
    for &arm in arms {
        let mut points: Vec<(f64, Summary)> =
            tables.iter().filter_map(|t| Some((x(&t.scenario), generation(t, arm)?))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by(|a, b| a.0 == b.0);
        if points.len() < 2 {
            continue;
        }
        let xy: Vec<(f64, f64)> = points.iter().map(|(x, s)| (*x, s.median)).collect();
        let whiskers: Vec<(f64, f64)> =
            points.iter().map(|(_, s)| (s.median - s.min, s.max - s.median)).collect();
        let line = LinePlot::new().with_data(xy.clone()).with_color(color(arm)).with_stroke_width(2.0);
        plots.push(Plot::Line(line.with_legend(arm.title())));
        let dots = ScatterPlot::new()
            .with_data(xy)
            .with_y_err_asymmetric(whiskers)
            .with_color(color(arm))
            .with_size(4.0);
        plots.push(Plot::Scatter(dots));
    }
    (!plots.is_empty()).then_some(plots)
}

fn base(plots: &[Plot]) -> Layout {
    Layout::auto_from_plots(plots)
        .with_width(760.0)
        .with_font_family("DejaVu Sans, Helvetica, Arial, sans-serif")
        .with_label_size(13)
        .with_tick_size(12)
        .with_body_size(12)
}

fn finish(layout: Layout) -> Layout {
    layout
        .with_y_label("tokens generated per second")
        .with_legend_position(LegendPosition::OutsideRightTop)
        .with_legend_box(false)
        .with_height(380.0)
}

fn label(arm: Arm, value: f64) -> String {
    format!("{} ({})", arm.title(), significant(value))
}

/// Three digits.
pub(super) fn significant(value: f64) -> String {
    if !value.is_finite() || value == 0.0 {
        return "0".to_owned();
    }
    let digits = 2 - value.abs().log10().floor() as i32;
    format!("{value:.*}", digits.clamp(0, 6) as usize)
}

/// Colours that people with any colour vision tell apart (Okabe and Ito).
fn color(arm: Arm) -> &'static str {
    match arm {
        Arm::Split => "#0072B2",
        Arm::Solo => "#D55E00",
        Arm::SoloUnlimited => GRAY,
        Arm::Rpc => "#E69F00",
        Arm::Q8_0 => "#009E73",
        Arm::Q4KM => "#56B4E9",
    }
}

const GRAY: &str = "#7F7F7F";

/// What a part of a token's time is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Head,
    Middle,
    Wire,
    Tail,
    Model,
    Sampling,
    Rest,
}

impl Kind {
    fn of(part: &str) -> Kind {
        match part.split([' ', ',']).next().unwrap_or("") {
            "head" => Kind::Head,
            "middle" => Kind::Middle,
            "wire" => Kind::Wire,
            "tail" => Kind::Tail,
            "model" => Kind::Model,
            "sampling" => Kind::Sampling,
            _ => Kind::Rest,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Kind::Head => "head, computing",
            Kind::Middle => "middle, computing",
            Kind::Wire => "wire and waiting",
            Kind::Tail => "tail, computing",
            Kind::Model => "whole model",
            Kind::Sampling => "sampling",
            Kind::Rest => "everything else",
        }
    }

    fn color(self) -> &'static str {
        match self {
            Kind::Head => "#0072B2",
            Kind::Middle => "#009E73",
            Kind::Wire => "#D55E00",
            Kind::Tail => "#56B4E9",
            Kind::Model => "#999999",
            Kind::Sampling => "#F0E442",
            Kind::Rest => "#333333",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::LinkOptions;
    use crate::summary::summarise;
    use crate::summary::tests::{record, scenario};

    fn tables() -> Vec<Table> {
        let mut records = Vec::new();
        for (i, limit) in [8.0e9, 10e9, 11e9, 12e9].into_iter().enumerate() {
            let s = Scenario { memory_limit_bytes: Some(limit as u64), link: None, ..scenario() };
            for round in 1..=3 {
                let noise = 1.0 + f64::from(round) * 0.03;
                records.push(record(&s, Arm::Split, round, 550.0 * noise));
                records.push(record(&s, Arm::Solo, round, (6000.0 + 2000.0 * (3 - i) as f64) * noise));
                records.push(record(&s, Arm::SoloUnlimited, round, 540.0 * noise));
                records.push(record(&s, Arm::Q8_0, round, 300.0 * noise));
            }
        }
        for rtt_ms in [1.0, 5.0, 20.0, 50.0] {
            let s = Scenario { link: Some(LinkOptions { rtt_ms, ..LinkOptions::default() }), ..scenario() };
            for round in 1..=3 {
                let noise = 1.0 + f64::from(round) * 0.03;
                records.push(record(&s, Arm::Split, round, (30.0 + rtt_ms) * noise));
                records.push(record(&s, Arm::Rpc, round, (32.0 + 1.1 * rtt_ms) * noise));
                records.push(record(&s, Arm::Solo, round, 30.0 * noise));
            }
        }
        summarise(&records)
    }

    #[test]
    fn every_plot_names_what_it_shows() {
        let tables = tables();
        let refs: Vec<&Table> = tables.iter().collect();
        let charts = [
            speeds(&tables[0], "speeds".into()).unwrap(),
            breakdown(&tables[0], "breakdown".into()).unwrap(),
            against_memory(&refs, "memory".into()).unwrap(),
            against_round_trip(&refs, "rtt".into()).unwrap(),
        ];
        let texts = [
            &["tokens generated per second", "solo Q8_0", "split"][..],
            &["milliseconds per generated token", "wire and waiting", "whole model"],
            &["memory limit of the host, GB", "solo", "split", "solo, no limit"],
            &["round trip of the link, ms", "bound: solo plus one round trip", "llama.cpp RPC"],
        ];
        for (chart, texts) in charts.iter().zip(texts) {
            assert!(chart.svg.starts_with("<svg"), "{}", &chart.svg[..60]);
            for text in texts {
                assert!(chart.svg.contains(text), "{}: no {text:?}", chart.name);
            }
            if let Some(dir) = std::env::var_os("DIM_CHARTS") {
                std::fs::write(std::path::Path::new(&dir).join(format!("{}.svg", chart.name)), &chart.svg)
                    .unwrap();
            }
        }
    }

    #[test]
    fn a_plot_without_points_is_not_made() {
        assert!(against_memory(&[], "m".into()).is_none());
        assert!(against_round_trip(&[&tables()[0]], "r".into()).is_none(), "one point makes no line");
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in
            [(0.1617, "0.162"), (1.847, "1.85"), (29.96, "30.0"), (1234.5, "1234"), (0.0, "0")]
        {
            assert_eq!(significant(value), text);
        }
    }
}
