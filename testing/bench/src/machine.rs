//! What the system says of processes and of itself, where it says so.

use std::fs;

/// What a device has used so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// Most memory at any time.
    pub(crate) memory_mib: Option<f64>,
    /// Processor time.
    pub(crate) cpu_seconds: Option<f64>,
}

impl Usage {
    /// Of a process and its children: the most memory of one of them, the processor time of all.
    pub(crate) fn of(pid: u32) -> Self {
        let mut usage = Self::default();
        let mut pids = vec![pid];
        while let Some(pid) = pids.pop() {
            pids.extend(children(pid));
            let memory = field_kib(&format!("/proc/{pid}/status"), "VmHWM:").map(|kib| kib / 1024.0);
            usage.memory_mib = [usage.memory_mib, memory].into_iter().flatten().reduce(f64::max);
            usage.cpu_seconds = [usage.cpu_seconds, cpu(pid)].into_iter().flatten().reduce(|one, other| one + other);
        }
        usage
    }
}

/// Processes that a process started; of each the system tells its parent.
fn children(parent: u32) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        after_name(&stat).nth(1).is_some_and(|id| id.parse() == Ok(parent))
    };
    pids.filter(is_child).collect()
}

fn cpu(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    ticks(&stat).map(|ticks| ticks as f64 / ticks_per_second())
}

/// A process's fields after its name, which may hold anything up to the last closing bracket.
fn after_name(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace()
}

/// User and system time.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = after_name(stat).skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(target_os = "linux")]
fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(not(target_os = "linux"))]
fn ticks_per_second() -> f64 {
    100.0
}

/// Waits until what was written before is on the disk, so that whoever is measured next does not pay for it.
pub(crate) fn settle_disk() {
    #[cfg(unix)]
    rustix::fs::sync();
}

/// Processors the program may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Memory of the machine.
pub(crate) fn memory_mib() -> Option<u64> {
    let kib = field_kib("/proc/meminfo", "MemTotal:")?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "mebibytes of a machine's memory")]
    Some((kib / 1024.0) as u64)
}

/// Runnable processes, over the last minute.
pub(crate) fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn field_kib(file: &str, field: &str) -> Option<f64> {
    let text = fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_after_any_name() {
        assert_eq!(ticks("12 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 40 2 0 0 20 0"), Some(42));
        assert_eq!(ticks("12 (a) S 1"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_used_something() {
        let usage = Usage::of(std::process::id());
        assert!(usage.memory_mib.is_some_and(|mib| mib > 0.5), "{usage:?}");
        assert!(usage.cpu_seconds.is_some(), "{usage:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_is_found_by_its_parent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        let found = children(std::process::id());
        child.kill().expect("killed");
        child.wait().expect("ended");
        assert!(found.contains(&child.id()), "{found:?}");
    }
}
