//! Figures with their floors and targets, and the table that shows them.

use std::fmt::Write as _;

use serde::Serialize;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Milliseconds.
    Milliseconds,
    /// Something a second.
    PerSecond,
    /// Mebibytes.
    Mebibytes,
    /// Kibibytes.
    Kibibytes,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Milliseconds => format!("{value:.3} ms"),
            Self::PerSecond => format!("{value:.0}/s"),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::Kibibytes => format!("{value:.1} KiB"),
        }
    }
}

/// What a figure must be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

impl Target {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }

    fn show(self, unit: Unit) -> String {
        match self {
            Self::AtMost(limit) => format!("≤ {}", unit.show(limit)),
            Self::AtLeast(limit) => format!("≥ {}", unit.show(limit)),
        }
    }
}

/// One line of the table, with the figure of each round.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    work: String,
    unit: Unit,
    ours: Vec<f64>,
    floor: Option<Floor>,
    target: Option<Target>,
}

/// What the machine does for the same work without us, in the same rounds.
#[derive(Debug, Clone, Serialize)]
struct Floor {
    name: &'static str,
    figures: Vec<f64>,
}

impl Row {
    /// A figure without a floor or a target.
    pub(crate) fn new(work: impl Into<String>, unit: Unit, ours: Vec<f64>) -> Self {
        Self { work: work.into(), unit, ours, floor: None, target: None }
    }

    /// What the machine does.
    pub(crate) fn floor(self, name: &'static str, figures: Vec<f64>) -> Self {
        Self { floor: Some(Floor { name, figures }), ..self }
    }

    /// What it must be.
    pub(crate) fn target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    fn ours(&self) -> f64 {
        quantile(&self.ours, 50)
    }

    /// Of ratios the median too, so that a round on a slower machine counts like any other.
    fn ratio(&self) -> Option<f64> {
        let floor = self.floor.as_ref()?;
        let ratios: Vec<f64> = self.ours.iter().zip(&floor.figures).map(|(ours, floor)| ours / floor).collect();
        Some(quantile(&ratios, 50))
    }

    fn met(&self) -> Option<bool> {
        self.target.map(|target| target.met(self.ours()))
    }

    fn cells(&self) -> [String; 7] {
        let floor = self.floor.as_ref();
        let limit =
            |take: fn(f64, f64) -> f64| self.ours.iter().copied().reduce(take).map(|value| self.unit.show(value));
        let (least, most) = (limit(f64::min).unwrap_or_default(), limit(f64::max).unwrap_or_default());
        [
            self.work.clone(),
            self.unit.show(self.ours()),
            if self.ours.len() > 1 { format!("{least} … {most}") } else { String::new() },
            floor.map_or(String::new(), |floor| {
                format!("{} ({})", self.unit.show(quantile(&floor.figures, 50)), floor.name)
            }),
            self.ratio().map_or(String::new(), |ratio| format!("{ratio:.2}")),
            self.target.map_or(String::new(), |target| target.show(self.unit)),
            self.met().map_or(String::new(), |met| if met { "yes" } else { "no" }.to_owned()),
        ]
    }
}

/// Everything a run found out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Processors the program may use.
    pub(crate) cores: usize,
    /// Memory of the machine in MiB, where the system tells.
    pub(crate) memory_mib: Option<u64>,
    /// Runnable processes over the last minute, before each round.
    pub(crate) load: Vec<f64>,
    /// The figures.
    pub(crate) rows: Vec<Row>,
}

#[derive(Serialize)]
struct JsonRow<'a> {
    #[serde(flatten)]
    row: &'a Row,
    median: f64,
    ratio: Option<f64>,
    met: Option<bool>,
}

impl Report {
    /// The report as one JSON object.
    pub(crate) fn json(&self) -> serde_json::Value {
        let rows: Vec<JsonRow<'_>> = self
            .rows
            .iter()
            .map(|row| JsonRow { row, median: row.ours(), ratio: row.ratio(), met: row.met() })
            .collect();
        serde_json::json!({ "cores": self.cores, "memory_mib": self.memory_mib, "load": self.load, "rows": rows })
    }

    /// The report as a table in Markdown, aligned to be read as it is.
    pub(crate) fn table(&self) -> String {
        let header = ["work", "ours", "rounds", "floor", "ratio", "target", "met"].map(str::to_owned);
        let mut lines = vec![header];
        lines.extend(self.rows.iter().map(Row::cells));
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 7] = std::array::from_fn(width);
        let memory = self.memory_mib.map_or(String::new(), |mib| format!(", {mib} MiB of memory"));
        let load = self.load.iter().map(|load| format!("{load:.2}")).collect::<Vec<_>>().join(", ");
        let rounds = self.load.len();
        let mut text = format!("{} cores{memory}; load before each of {rounds} rounds: {load}\n\n", self.cores);
        for (at, line) in lines.iter().enumerate() {
            let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect::<Vec<_>>();
            let _ = writeln!(text, "| {} |", cells.join(" | "));
            if at == 0 {
                let rule = widths.map(|width| "-".repeat(width));
                let _ = writeln!(text, "| {} |", rule.join(" | "));
            }
        }
        let missed: Vec<&str> =
            self.rows.iter().filter(|row| row.met() == Some(false)).map(|row| row.work.as_str()).collect();
        let verdict =
            if missed.is_empty() { "every target met".to_owned() } else { format!("missed: {}", missed.join("; ")) };
        let _ = writeln!(text, "\n{verdict}");
        text
    }
}

/// The figure that this many per cent of the others do not exceed; NaN of none.
pub(crate) fn quantile(figures: &[f64], percent: usize) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_one_of_the_figures() {
        let figures: Vec<f64> = (0..100).rev().map(f64::from).collect();
        for (percent, expected) in [(0, 0.0), (50, 50.0), (99, 99.0), (100, 99.0)] {
            assert_eq!(quantile(&figures, percent).to_bits(), f64::to_bits(expected), "{percent}");
        }
        assert!(quantile(&[], 50).is_nan());
    }

    #[test]
    fn a_missed_target_is_said_and_ratios_are_taken_round_by_round() {
        let slow = Row::new("slow", Unit::Milliseconds, vec![30.0, 10.0, 20.0])
            .floor("disk", vec![10.0, 10.0, 10.0])
            .target(Target::AtMost(15.0));
        let fast = Row::new("fast", Unit::PerSecond, vec![100.0]).target(Target::AtLeast(100.0));
        let report = Report { cores: 2, memory_mib: None, load: vec![0.5], rows: vec![slow, fast] };
        let table = report.table();
        assert!(
            table.contains("| 20.000 ms | 10.000 ms … 30.000 ms | 10.000 ms (disk) | 2.00  | ≤ 15.000 ms | no  |"),
            "{table}"
        );
        assert!(table.ends_with("missed: slow\n"), "{table}");
        assert_eq!(report.json()["rows"][1]["met"], true);
    }
}
