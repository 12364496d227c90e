//! What an operator asks of a relay.

use crate::raw::Member;
use crate::site::{RelayProcess, Site};

#[tokio::test(flavor = "multi_thread")]
async fn stats_shows_the_numbers_of_a_relay_that_runs() {
    let site = Site::new();
    let mut relay = RelayProcess::start(&site, "relay", "plain = false\n");
    Member::founder().live(&relay.url).await;
    let (done, said) = relay.operate(&["stats"]);
    let groups = said.lines().find(|line| line.starts_with("groups ")).unwrap_or_else(|| panic!("{said}"));
    assert!(done && groups.contains(" 1 ") && groups.ends_with("Groups that are kept."), "{said}");
    relay.stop();
    let (done, said) = relay.operate(&["stats"]);
    assert!(!done && said.contains("the relay cannot be reached"), "{said}");
}

#[test]
fn check_tells_how_far_a_device_would_come() {
    let site = Site::new();
    let (mut relay, other) = (
        RelayProcess::start(&site, "relay", "plain = false\n"),
        RelayProcess::start(&site, "other", "plain = false\n"),
    );
    let (done, said) = relay.operate(&["check"]);
    assert!(done && said.contains("its database works") && said.contains("proven its key"), "{said}");
    assert_eq!(relay.operate(&["check", &relay.url]), (true, said));
    // another relay's key at this one's address
    let swapped = format!("{}#{}", relay.url.split_once('#').unwrap().0, other.url.split_once('#').unwrap().1);
    let (done, said) = relay.operate(&["check", &swapped]);
    assert!(!done && said.contains("another certificate is shown"), "{said}");
    relay.stop();
    let (done, said) = relay.operate(&["check"]);
    assert!(!done && said.contains("the relay cannot be reached"), "{said}");
}
