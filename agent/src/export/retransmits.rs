//! The retransmits of a recording as a table: who sent again to whom, and why.
//!
//! Pure, over what was told one by one. Occurrences are bounded for each flush, so that the sums
//! here can be below those of the samples; [`crate::profile::Batch::occurrences_lost`] says by how
//! much.

use std::{cmp::Reverse, fmt::Write as _, net::SocketAddr};

use hashbrown::HashMap;
use serde::Serialize;

use crate::{
    fold::{printable, workload_name},
    profile::{Dictionary, Occurrence, What},
};

/// The retransmits of one owner to one peer for one cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RetransmitRow {
    /// The workload that owns the socket, as in the profile: not safe for a terminal.
    pub owner: String,
    /// The other end, with the port of the service: see [`peer`].
    pub peer: String,
    /// What made TCP send again, by [`crate::event::Cause::name`].
    pub cause: &'static str,
    /// How often.
    pub hits: u64,
    /// Segments sent again.
    pub segments: u64,
    /// Hits for which the stack that had sent the data is known.
    pub sender_known: u64,
}

/// The rows of a recording, most segments first. Occurrences of other kinds are passed over.
#[must_use]
pub fn retransmits(occurrences: &[Occurrence], dictionary: &Dictionary) -> Vec<RetransmitRow> {
    let mut rows: HashMap<(String, String, &'static str), [u64; 3]> = HashMap::new();
    for occurrence in occurrences {
        let What::Retransmit { local, remote, cause, segments, sender_age_ns, .. } =
            &occurrence.what
        else {
            continue;
        };
        let workload = dictionary.workload(occurrence.workload);
        let owner = workload.map_or("[unattributed]".into(), |w| workload_name(w)).into_owned();
        let sums = rows.entry((owner, peer(*local, *remote), cause.name())).or_default();
        let add = [1, *segments, u64::from(sender_age_ns.is_some())];
        for (sum, part) in sums.iter_mut().zip(add) {
            *sum = sum.saturating_add(part);
        }
    }
    let mut rows: Vec<RetransmitRow> = rows
        .into_iter()
        .map(|((owner, peer, cause), [hits, segments, sender_known])| RetransmitRow {
            owner,
            peer,
            cause,
            hits,
            segments,
            sender_known,
        })
        .collect();
    rows.sort_by(|a, b| {
        let key = |row: &RetransmitRow| (Reverse(row.segments), Reverse(row.hits));
        let name = |row: &RetransmitRow| (row.owner.clone(), row.peer.clone(), row.cause);
        key(a).cmp(&key(b)).then_with(|| name(a).cmp(&name(b)))
    });
    rows
}

/// The other end of a connection, so that connections to one service are one peer. The lower of the
/// two ports is taken for the service's: a client's is ephemeral, and those are high (RFC 6335,
/// section 6). `192.0.2.7:443` is a service that is called, `192.0.2.9 (to :443)` a client of ours.
#[must_use]
pub fn peer(local: SocketAddr, remote: SocketAddr) -> String {
    let address = remote.ip().to_canonical();
    if remote.port() <= local.port() {
        SocketAddr::new(address, remote.port()).to_string()
    } else {
        format!("{address} (to :{})", local.port())
    }
}

/// The rows as an aligned table with a header, safe for a terminal. Empty if there is none.
#[must_use]
pub fn text(rows: &[RetransmitRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let header = ["OWNER", "PEER", "CAUSE", "HITS", "SEGMENTS", "SENDER KNOWN"];
    let mut table = vec![header.map(str::to_owned)];
    table.extend(rows.iter().map(|row| {
        let known = 100.0 * row.sender_known as f64 / row.hits.max(1) as f64;
        [
            printable(&row.owner).into_owned(),
            row.peer.clone(),
            row.cause.to_owned(),
            row.hits.to_string(),
            row.segments.to_string(),
            format!("{known:.0}%"),
        ]
    }));
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; 6] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut out = String::new();
    for row in &table {
        let [owner, peer, cause, hits, segments, known] = row;
        let [w0, w1, w2, w3, w4, w5] = widths;
        let _infallible = writeln!(
            out,
            "{owner:w0$}  {peer:w1$}  {cause:w2$}  {hits:>w3$}  {segments:>w4$}  {known:>w5$}"
        );
    }
    out
}

#[cfg(test)]
mod tests;
