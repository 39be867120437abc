//! Takes out of every text what must not leave the node: names of functions, files, commands and
//! workloads, and addresses. Applied where texts enter the dictionary, so that nothing behind it
//! (memory of the agent, streams, files) ever has them.
//!
//! A rule is a regular expression, of which every match is replaced: by a fixed word, or by a keyed
//! hash (HMAC-SHA256, RFC 2104), which is the same for the same text and key, so that two places
//! can still be told to be alike, and cannot be guessed without the key. The expressions are matched
//! in linear time, whatever the text.

use std::{
    borrow::Cow,
    fs,
    io::Read as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use regex::{Captures, Regex};
use sha2::Sha256;

use crate::profile::Workload;

/// Rules at most; each is tried on every new text.
const MAX_RULES: usize = 64;

/// Bytes of a key at least, and how many are made where none is given.
const KEY_BYTES: usize = 32;

/// Bytes read of a key at most.
const MAX_KEY_BYTES: u64 = 4096;

/// What stands for what was taken out.
const REMOVED: &str = "[redacted]";

/// Bytes of a hash that are shown: as good as unique among the texts of a node.
const SHOWN: usize = 8;

/// Why there are no rules.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An expression.
    #[error("{0:?} is no regular expression: {1}")]
    Regex(String, String),
    /// Too many.
    #[error("more than {MAX_RULES} rules: join some with |")]
    TooMany,
    /// The key.
    #[error("the key in {0}: {1}")]
    Key(String, String),
}

/// The rules. See the module.
#[derive(Debug, Default)]
pub struct Redactor {
    rules: Vec<(Regex, How)>,
    key: Vec<u8>,
}

/// What becomes of a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Remove,
    Hash,
}

impl Redactor {
    /// Rules from expressions: matches of some are removed, those of others hashed with the key in a
    /// file, or with one that lasts as long as this process.
    ///
    /// # Errors
    /// When an expression or the key cannot be used.
    pub fn new(remove: &[String], hash: &[String], key: Option<&Path>) -> Result<Self, Error> {
        if remove.len() + hash.len() > MAX_RULES {
            return Err(Error::TooMany);
        }
        let of = |how| {
            move |text: &String| {
                let regex = Regex::new(text);
                regex.map(|r| (r, how)).map_err(|e| Error::Regex(text.clone(), e.to_string()))
            }
        };
        let rules = hash.iter().map(of(How::Hash)).chain(remove.iter().map(of(How::Remove)));
        let rules = rules.collect::<Result<_, _>>()?;
        let key = match key {
            _ if hash.is_empty() => Vec::new(),
            Some(path) => read_key(path)?,
            None => random_key()?,
        };
        Ok(Self { rules, key })
    }

    /// Whether every text stays as it is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// A text without what the rules take out.
    #[must_use]
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for (regex, how) in &self.rules {
            let replaced = regex.replace_all(&text, |found: &Captures<'_>| {
                // Nothing is taken out of nothing.
                match (&found[0], how) {
                    ("", _) => String::new(),
                    (_, How::Remove) => REMOVED.to_owned(),
                    (matched, How::Hash) => self.hash(matched),
                }
            });
            if let Cow::Owned(replaced) = replaced {
                text = Cow::Owned(replaced);
            }
        }
        text
    }

    /// A workload without what the rules take out of its names. What tells pods and containers
    /// apart stays.
    #[must_use]
    pub fn workload(&self, workload: &Arc<Workload>) -> Arc<Workload> {
        if self.is_empty() {
            return Arc::clone(workload);
        }
        let mut clean = Workload::clone(workload);
        for field in [
            &mut clean.name,
            &mut clean.namespace,
            &mut clean.pod,
            &mut clean.container,
            &mut clean.image,
            &mut clean.owner.name,
            &mut clean.node,
            &mut clean.unit,
            &mut clean.cgroup_path,
            &mut clean.unattributed,
        ]
        .into_iter()
        .chain(clean.labels.iter_mut().map(|(_, value)| value))
        {
            if let Cow::Owned(text) = self.text(field) {
                *field = text;
            }
        }
        Arc::new(clean)
    }

    /// An address, or the unspecified one where a rule takes something out of it; the port stays.
    #[must_use]
    pub fn address(&self, address: SocketAddr) -> SocketAddr {
        match self.text(&address.ip().to_string()) {
            Cow::Borrowed(_) => address,
            Cow::Owned(_) => {
                let nowhere = match address {
                    SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                    SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                };
                SocketAddr::new(nowhere, address.port())
            }
        }
    }

    fn hash(&self, text: &str) -> String {
        // A key of any length will do.
        let Ok(mac) = Hmac::<Sha256>::new_from_slice(&self.key) else { return REMOVED.to_owned() };
        let mac = mac.chain_update(text).finalize().into_bytes();
        mac.iter().take(SHOWN).fold(String::from("~"), |hex, byte| format!("{hex}{byte:02x}"))
    }
}

fn read_key(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |reason: String| Error::Key(path.display().to_string(), reason);
    let mut key = Vec::new();
    let file = fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    file.take(MAX_KEY_BYTES).read_to_end(&mut key).map_err(|e| failed(e.to_string()))?;
    if key.len() < KEY_BYTES {
        return Err(failed(format!("it has {} bytes, and {KEY_BYTES} are needed", key.len())));
    }
    Ok(key)
}

fn random_key() -> Result<Vec<u8>, Error> {
    const SOURCE: &str = "/dev/urandom";
    let mut key = vec![0; KEY_BYTES];
    let read = fs::File::open(SOURCE).and_then(|mut file| file.read_exact(&mut key));
    read.map_err(|e| Error::Key(SOURCE.to_owned(), e.to_string()))?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    fn redactor(remove: &[&str], hash: &[&str]) -> Redactor {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let mut redactor = Redactor::new(&own(remove), &own(hash), None).unwrap();
        redactor.key = vec![0x0b; 20];
        redactor
    }

    #[test]
    fn a_hash_is_the_start_of_what_rfc_4231_says() {
        assert_eq!(redactor(&[], &[]).hash("Hi There"), "~b0344c61d8db3853");
    }

    #[test]
    fn matches_are_removed_or_hashed_and_the_rest_stays() {
        let rules = redactor(&["secret_[a-z]+", "^$|x*y"], &[r"10\.\d+\.\d+\.\d+"]);
        assert_eq!(rules.text("app::secret_sauce::run"), "app::[redacted]::run");
        let peer = rules.text("peer 10.1.2.3:80");
        assert!(peer.starts_with("peer ~") && peer.ends_with(":80"), "{peer}");
        assert_eq!(peer, rules.text("peer 10.1.2.3:80"));
        assert_ne!(peer, rules.text("peer 10.1.2.4:80"));
        assert!(matches!(rules.text("plain"), Cow::Borrowed("plain")));
        let address = |text: &str| rules.address(text.parse().unwrap()).to_string();
        assert_eq!(address("10.1.2.3:80"), "0.0.0.0:80");
        assert_eq!(address("192.0.2.1:80"), "192.0.2.1:80");
    }

    #[test]
    fn a_workload_keeps_what_tells_it_apart() {
        let workload = Arc::new(Workload {
            name: "shop/secret_a/app".into(),
            pod: "secret_a".into(),
            pod_uid: "secret_a".into(),
            labels: vec![("app".into(), "secret_a".into())],
            ..Workload::default()
        });
        let clean = redactor(&["secret_[a-z]+"], &[]).workload(&workload);
        assert_eq!((&*clean.name, &*clean.pod), ("shop/[redacted]/app", "[redacted]"));
        assert_eq!((&*clean.labels[0].1, &*clean.pod_uid), ("[redacted]", "secret_a"));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let rules = vec!["(".to_owned()];
        assert!(Redactor::new(&rules, &[], None).unwrap_err().to_string().contains("\"(\""));
        let many = vec!["a".to_owned(); MAX_RULES + 1];
        assert!(matches!(Redactor::new(&many, &[], None), Err(Error::TooMany)));
        let missing = Redactor::new(&[], &["a".to_owned()], Some(Path::new("/nonexistent")));
        assert!(missing.unwrap_err().to_string().contains("/nonexistent"));
        let short = tempfile::NamedTempFile::new().unwrap();
        let short = Redactor::new(&[], &["a".to_owned()], Some(short.path()));
        assert!(short.unwrap_err().to_string().contains("32 are needed"));
    }
}
