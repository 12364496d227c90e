//! The folders' table: a line for each figure, a column for each tool, and what ours must be.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use serde_json::json;

use crate::figures::quantile;
use crate::machine;

/// Whose figure it is; the columns, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Tool {
    /// This project.
    Ours,
    /// Syncthing.
    Syncthing,
    /// A local copy by rsync.
    Rsync,
    /// A local copy by `cp -a`.
    Cp,
    /// A walk by `find`.
    Find,
}

impl Tool {
    /// What the column is called.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Syncthing => "Syncthing",
            Self::Rsync => "rsync -a",
            Self::Cp => "cp -a",
            Self::Find => "find",
        }
    }
}

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// Mebibytes.
    Mebibytes,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Seconds => format!("{value:.2} s"),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::Mebibytes => format!("{value:.1} MiB"),
        }
    }
}

/// What ours must be: at most `limit`, or that many times another tool's figure.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Goal {
    /// The line's title.
    pub(crate) line: String,
    /// The limit.
    pub(crate) limit: f64,
    /// The other tool.
    pub(crate) against: Option<Tool>,
}

/// A figure of each tool in each round.
#[derive(Debug)]
struct Line {
    title: String,
    unit: Unit,
    figures: BTreeMap<Tool, Vec<f64>>,
}

impl Line {
    fn median(&self, tool: Tool) -> Option<f64> {
        self.figures.get(&tool).map(|figures| quantile(figures, 50))
    }
}

/// Everything a run found out.
#[derive(Debug)]
pub(crate) struct Table {
    notes: Vec<String>,
    loads: Vec<f64>,
    lines: Vec<Line>,
    goals: Vec<Goal>,
}

impl Table {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self { notes: Vec::new(), loads: Vec::new(), lines: Vec::new(), goals: Vec::new() }
    }

    /// A sentence above the table.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Runnable processes before a round.
    pub(crate) fn load(&mut self, load: Option<f64>) {
        self.loads.extend(load);
    }

    /// A figure; lines are in the order in which they first come up. It is said at once: a run may be broken off.
    pub(crate) fn add(&mut self, title: &str, unit: Unit, tool: Tool, figure: f64) {
        eprintln!("    {}, {}: {}", title.trim(), tool.name(), unit.show(figure));
        let at = self.lines.iter().position(|line| line.title == title).unwrap_or_else(|| {
            self.lines.push(Line { title: title.to_owned(), unit, figures: BTreeMap::new() });
            self.lines.len() - 1
        });
        self.lines[at].figures.entry(tool).or_default().push(figure);
    }

    /// The goals, in the order of their lines.
    fn goals(&self) -> impl Iterator<Item = &Goal> {
        self.lines.iter().flat_map(|line| self.goals.iter().filter(|goal| goal.line == line.title))
    }

    /// What a line of ours must be.
    pub(crate) fn goal(&mut self, goal: Goal) {
        if !self.goals.contains(&goal) {
            self.goals.push(goal);
        }
    }

    /// Of a goal what ours is, in the goal's measure, and its line; none if one of both was not measured.
    fn reached(&self, goal: &Goal) -> Option<(f64, &Line)> {
        let line = self.lines.iter().find(|line| line.title == goal.line)?;
        let ours = line.figures.get(&Tool::Ours)?;
        match goal.against {
            None => Some((quantile(ours, 50), line)),
            Some(tool) => {
                // of ratios the median, so that a round on a slower machine counts like any other
                let ratios: Vec<f64> =
                    ours.iter().zip(line.figures.get(&tool)?).map(|(ours, theirs)| ours / theirs).collect();
                Some((quantile(&ratios, 50), line))
            }
        }
    }

    /// The table in Markdown, aligned to be read as it is, and the goals below it.
    pub(crate) fn text(&self) -> String {
        let mut text = self.notes.iter().fold(String::new(), |text, note| text + note + "\n");
        let memory = machine::memory_mib().map_or(String::new(), |mib| format!(", {mib} MiB of memory"));
        let loads = self.loads.iter().map(|load| format!("{load:.2}")).collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "{} cores{memory}; load before each round: {loads}\n", machine::cores());

        let tools: Vec<Tool> = [Tool::Ours, Tool::Syncthing, Tool::Rsync, Tool::Cp, Tool::Find]
            .into_iter()
            .filter(|tool| self.lines.iter().any(|line| line.figures.contains_key(tool)))
            .collect();
        let mut rows =
            vec![std::iter::once("work").chain(tools.iter().map(|tool| tool.name())).map(str::to_owned).collect()];
        for line in &self.lines {
            let figure = |tool: &Tool| line.median(*tool).map_or(String::new(), |figure| line.unit.show(figure));
            rows.push(std::iter::once(line.title.clone()).chain(tools.iter().map(figure)).collect());
        }
        grid(&mut text, &rows);

        let mut missed = 0;
        let mut rows = vec![["target", "at most", "is", "met"].map(str::to_owned).to_vec()];
        for goal in self.goals() {
            let Some((is, line)) = self.reached(goal) else { continue };
            let met = is <= goal.limit;
            missed += usize::from(!met);
            let show = |value: f64| match goal.against {
                Some(tool) => format!("{value:.2} × {}", tool.name()),
                None => line.unit.show(value),
            };
            let yes = if met { "yes" } else { "no" };
            rows.push(vec![goal.line.trim().to_owned(), show(goal.limit), show(is), yes.to_owned()]);
        }
        text.push('\n');
        grid(&mut text, &rows);
        let verdict = if missed == 0 { "every target met".to_owned() } else { format!("{missed} targets missed") };
        let _ = writeln!(text, "\n{verdict}");
        text
    }

    /// The report as one JSON object.
    pub(crate) fn json(&self) -> serde_json::Value {
        let lines: Vec<_> = self
            .lines
            .iter()
            .map(|line| json!({ "work": line.title.trim(), "unit": line.unit, "figures": line.figures }))
            .collect();
        let goals: Vec<_> = self
            .goals()
            .filter_map(|goal| {
                let (is, _) = self.reached(goal)?;
                let (work, met) = (goal.line.trim(), is <= goal.limit);
                Some(json!({ "work": work, "against": goal.against, "at_most": goal.limit, "is": is, "met": met }))
            })
            .collect();
        json!({
            "notes": self.notes, "cores": machine::cores(), "memory_mib": machine::memory_mib(), "load": self.loads,
            "lines": lines, "targets": goals,
        })
    }
}

fn grid(text: &mut String, rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (at, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if at == 0 {
            let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
            let _ = writeln!(text, "| {} |", rule.join(" | "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_compared_round_by_round_and_one_that_was_not_measured_is_left_out() {
        let mut table = Table::new();
        for (ours, theirs) in [(3.0, 10.0), (9.0, 10.0), (4.0, 5.0)] {
            table.add("sync", Unit::Seconds, Tool::Ours, ours);
            table.add("sync", Unit::Seconds, Tool::Syncthing, theirs);
        }
        table.add("save", Unit::Milliseconds, Tool::Ours, 12.0);
        for (line, limit, against) in
            [("sync", 0.75, Some(Tool::Syncthing)), ("sync", 1.3, Some(Tool::Cp)), ("save", 60.0, None)]
        {
            let goal = Goal { line: line.to_owned(), limit, against };
            table.goal(goal.clone());
            table.goal(goal);
        }
        let text = table.text();
        assert!(text.contains("| sync | 4.00 s  | 10.00 s   |"), "{text}");
        assert!(text.contains("| sync   | 0.75 × Syncthing | 0.80 × Syncthing | no  |"), "{text}");
        assert!(text.contains("| save   | 60.0 ms          | 12.0 ms          | yes |"), "{text}");
        assert!(!text.contains("cp -a"), "{text}");
        assert!(text.ends_with("1 targets missed\n"), "{text}");
        let json = table.json();
        assert_eq!(json["targets"].as_array().map(Vec::len), Some(2));
        assert_eq!(json["lines"][0]["figures"]["ours"][1], 9.0);
    }
}
