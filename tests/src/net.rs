//! Two network namespaces joined by a cable that loses packets.
//!
//! Traffic never leaves the namespaces. Loss is made by the receiver's packet filter, since the
//! queueing discipline for it (netem) is missing in many kernels.

use std::{
    fmt::Display,
    fs::{self, File},
    os::{
        fd::AsRawFd as _,
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    process::{self, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, bail};

/// A named network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace, with its loopback up.
    ///
    /// # Errors
    /// When `ip` is missing or refuses.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let netns = Self { name: format!("podflame-{}-{count}", process::id()) };
        run("ip", &["netns", "add", &netns.name])?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Makes the command start inside. Everything but the network stays as it is outside.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let path = format!("/run/netns/{}", self.name);
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        // SAFETY: between fork and exec it only calls setns(2), which is async-signal-safe, on a
        // descriptor that the closure keeps open.
        unsafe {
            command.pre_exec(move || match libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        Ok(())
    }

    /// The inode number, which tells it from every other namespace.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn inode(&self) -> Result<u64> {
        Ok(fs::metadata(format!("/run/netns/{}", self.name))?.ino())
    }

    /// A counter of `/proc/net/netstat` or `/proc/net/snmp` inside, such as `Tcp`, `RetransSegs`.
    ///
    /// # Errors
    /// When there is no such counter.
    pub fn counter(&self, group: &str, name: &str) -> Result<u64> {
        let mut cat = Command::new("cat");
        cat.args(["/proc/self/net/snmp", "/proc/self/net/netstat"]);
        self.enter(&mut cat)?;
        read_counter(&output(&mut cat)?, group, name)
    }

    /// Whether every TCP connection inside is over: nothing is left to send, or to send again.
    ///
    /// # Errors
    /// When the sockets cannot be listed.
    pub fn tcp_is_quiet(&self) -> Result<bool> {
        let mut cat = Command::new("cat");
        cat.args(["/proc/self/net/tcp", "/proc/self/net/tcp6"]);
        self.enter(&mut cat)?;
        // The fourth field is the state; 06 is TIME_WAIT and 0A is LISTEN.
        let sockets = output(&mut cat)?;
        let mut states = sockets.lines().filter_map(|line| line.split_whitespace().nth(3));
        Ok(states.all(|state| matches!(state, "st" | "06" | "0A")))
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        let words: Vec<_> =
            ["-netns", &self.name].into_iter().chain(arguments.split(' ')).collect();
        run("ip", &words)
    }
}

/// A counter of `/proc/net/snmp` of the network namespace that the test itself is in.
///
/// # Errors
/// When there is no such counter.
pub fn own_counter(group: &str, name: &str) -> Result<u64> {
    read_counter(&fs::read_to_string("/proc/self/net/snmp")?, group, name)
}

fn read_counter(text: &str, group: &str, name: &str) -> Result<u64> {
    // Two lines for each group: the names, then the values.
    let prefix = format!("{group}: ");
    let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
    let [names, values] = lines[..] else { bail!("no counters of {group}") };
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs
        .find(|(its, _)| *its == name)
        .with_context(|| format!("no counter {name} of {group}"))?;
    value.parse().with_context(|| format!("{group} {name}: {value:?}"))
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["netns", "delete", &self.name]) {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// Two namespaces and the cable between them.
#[derive(Debug)]
pub struct NetPair {
    /// Has [`NetPair::SENDER_V4`] and [`NetPair::SENDER_V6`].
    pub sender: Netns,
    /// Has [`NetPair::RECEIVER_V4`] and [`NetPair::RECEIVER_V6`], and loses packets if told to.
    pub receiver: Netns,
}

impl NetPair {
    /// The sender's IPv4 address.
    pub const SENDER_V4: &str = "10.77.0.1";
    /// The receiver's IPv4 address.
    pub const RECEIVER_V4: &str = "10.77.0.2";
    /// The sender's IPv6 address.
    pub const SENDER_V6: &str = "fd77::1";
    /// The receiver's IPv6 address.
    pub const RECEIVER_V6: &str = "fd77::2";

    /// Makes both namespaces and joins them.
    ///
    /// # Errors
    /// When `ip` is missing or refuses.
    pub fn new() -> Result<Self> {
        let pair = Self { sender: Netns::new()?, receiver: Netns::new()? };
        let peer = &pair.receiver.name;
        pair.sender.ip(&format!("link add veth0 type veth peer name veth0 netns {peer}"))?;
        for (netns, v4, v6) in [
            (&pair.sender, Self::SENDER_V4, Self::SENDER_V6),
            (&pair.receiver, Self::RECEIVER_V4, Self::RECEIVER_V6),
        ] {
            netns.ip(&format!("address add {v4}/24 dev veth0"))?;
            // Without duplicate address detection the address can be used at once.
            netns.ip(&format!("address add {v6}/64 dev veth0 nodad"))?;
            netns.ip("link set veth0 up")?;
        }
        Ok(pair)
    }

    /// Has the receiver lose that share of the packets sent to its TCP port, or ports (`7001-7002`).
    ///
    /// Ends when what is returned is dropped; until then it counts what was lost.
    ///
    /// # Errors
    /// When `nft` is missing or refuses.
    pub fn lose(&self, percent: u32, port: impl Display) -> Result<Lossy<'_>> {
        let which = format!("tcp dport {port} numgen random mod 100 < {percent}");
        Lossy::new(&self.receiver, &which)
    }

    /// Has the receiver lose every SYN to its TCP port.
    ///
    /// # Errors
    /// When `nft` is missing or refuses.
    pub fn lose_syns(&self, port: u16) -> Result<Lossy<'_>> {
        Lossy::new(&self.receiver, &format!("tcp dport {port} tcp flags & (syn | ack) == syn"))
    }

    /// Has the sender lose every SYN-ACK from the receiver's TCP port.
    ///
    /// # Errors
    /// When `nft` is missing or refuses.
    pub fn lose_synacks(&self, port: u16) -> Result<Lossy<'_>> {
        let which = format!("tcp sport {port} tcp flags & (syn | ack) == syn | ack");
        Lossy::new(&self.sender, &which)
    }
}

/// Packet loss, until dropped.
#[derive(Debug)]
pub struct Lossy<'pair> {
    netns: &'pair Netns,
}

impl<'pair> Lossy<'pair> {
    /// Loses what comes in and fits.
    fn new(netns: &'pair Netns, which: &str) -> Result<Self> {
        let lossy = Self { netns };
        lossy.nft(&format!(
            "add table inet loss; \
             add chain inet loss in {{ type filter hook input priority 0; }}; \
             add rule inet loss in {which} counter drop"
        ))?;
        Ok(lossy)
    }

    /// How many packets were lost so far.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn packets(&self) -> Result<u64> {
        let rules = self.nft("list table inet loss")?;
        // … counter packets 12 bytes 3456 drop
        let mut words = rules.split_whitespace().skip_while(|word| *word != "packets");
        let count = words.nth(1).context("no counter in the rule")?;
        Ok(count.parse()?)
    }

    fn nft(&self, script: &str) -> Result<String> {
        let mut nft = Command::new("nft");
        nft.arg(script);
        self.netns.enter(&mut nft)?;
        output(&mut nft)
    }
}

impl Drop for Lossy<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.nft("delete table inet loss") {
            eprintln!("left behind: {error:#}");
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    output(Command::new(program).args(arguments)).map(drop)
}

fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {command:?}: run the tests by `cargo xtask test`"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8(out.stdout)?)
}

/// Whether names made here are gone; for the test of the guards themselves.
#[must_use]
pub fn left_behind() -> usize {
    let mine = format!("podflame-{}-", process::id());
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    names.filter(|name| name.file_name().to_string_lossy().starts_with(&mine)).count()
}
