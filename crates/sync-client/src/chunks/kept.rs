//! Asking every peer that is connected what it keeps of a path.

use std::time::Duration;

use sync_link::iroh_link::{Connection, DeviceId};
use sync_types::FolderId;
use sync_types::bounds::MAX_CHUNK_FRAME;
use sync_types::folder::{ChunkFrame, KeptFile, TreePath};
use tokio::task::JoinSet;

use crate::group::Group;

/// How long a peer may take to say what it keeps: longer than a disk takes to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the connected members of a group keep of a path of one of its folders; who does not answer keeps nothing.
pub(crate) async fn ask_kept(group: &Group, folder: FolderId, path: &TreePath) -> Vec<(DeviceId, Vec<KeptFile>)> {
    let channels: Vec<Connection> = group.chunks.channels.borrow().values().cloned().collect();
    let ask = ChunkFrame::AskKept { folder, path: path.clone() }.encode();
    let mut asking = JoinSet::new();
    for connection in channels {
        let ask = ask.clone();
        asking.spawn(async move {
            let device = connection.remote_device();
            let answered = tokio::time::timeout(PATIENCE, one(&connection, ask)).await.ok().flatten();
            (device, answered.unwrap_or_default())
        });
    }
    asking.join_all().await
}

async fn one(connection: &Connection, ask: Vec<u8>) -> Option<Vec<KeptFile>> {
    let (mut sender, mut receiver) = connection.open_stream(MAX_CHUNK_FRAME).await.ok()?.split();
    sender.send(ask).await.ok()?;
    sender.finish().await.ok()?;
    match ChunkFrame::decode(&receiver.recv().await.ok()??) {
        Ok(ChunkFrame::Kept { files }) => Some(files),
        _ => None,
    }
}
