//! A device in another process, from the side of who gives it orders.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::peer::{Answer, Order, PATIENCE};

/// Wait for an answer: longer than the peer itself waits, so that its own error is told.
const ANSWER_WAIT: Duration = Duration::from_secs(2 * PATIENCE.as_secs());

/// A process that plays one device; it ends with this value.
#[derive(Debug)]
pub(crate) struct Remote {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Remote {
    /// Starts a process.
    pub(crate) fn start() -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut child = Command::new(program)
            .arg("peer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a second process")?;
        let orders = child.stdin.take().context("no way to the second process")?;
        let answers = BufReader::new(child.stdout.take().context("no way from the second process")?).lines();
        Ok(Self { child, orders, answers })
    }

    /// Gives an order and waits for the answer.
    pub(crate) async fn ask(&mut self, order: Order) -> Result<Answer> {
        self.tell(&order).await?;
        self.answer().await.with_context(|| format!("the order {order:?} failed"))
    }

    /// Gives an order that is answered with nothing but that it is done.
    pub(crate) async fn order(&mut self, order: Order) -> Result<()> {
        match self.ask(order).await? {
            Answer::Done => Ok(()),
            other => unexpected(&other),
        }
    }

    /// Waits for an answer.
    pub(crate) async fn answer(&mut self) -> Result<Answer> {
        let line = tokio::time::timeout(ANSWER_WAIT, self.answers.next_line()).await.context("no answer")??;
        match serde_json::from_str(&line.context("the process ended")?)? {
            Answer::Failed { text } => bail!(text),
            answer => Ok(answer),
        }
    }

    async fn tell(&mut self, order: &Order) -> Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.orders.write_all(&line).await?;
        self.orders.flush().await?;
        Ok(())
    }

    /// Closes the home and ends the process; its newest cursor.
    pub(crate) async fn close(mut self) -> Result<u64> {
        let Answer::Closed { cursor } = self.ask(Order::Close).await? else { bail!("closed otherwise than expected") };
        drop(self.orders);
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await.context("the process does not end")??;
        anyhow::ensure!(status.success(), "the process ended with {status}");
        Ok(cursor)
    }
}

/// An answer to something else than was asked.
pub(crate) fn unexpected<T>(answer: &Answer) -> Result<T> {
    bail!("an answer that was not asked for: {answer:?}")
}
