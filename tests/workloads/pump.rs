//! Sends bytes over TCP, and swallows them.
//!
//! `pump listen ADDRESS:PORT [--seconds N]`: reads whatever is sent, on any number of connections; port
//! 0 for any free one. Writes `ready ADDRESS:PORT`.
//!
//! `pump send ADDRESS:PORT [--seconds N] [--pause-ms N]`: sends from `pump_loop`, `send_payload`; with
//! pauses, in bursts of 64 KiB whose last segment nothing follows.
//!
//! Both take IPv4 and `[IPv6]`. Both end with one line of JSON: the bytes sent or read.

use std::{
    env,
    hint::black_box,
    io::{ErrorKind, Read, Write as _},
    net::{TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use podflame_tests::load::{Load, option, ready};

/// How long one read or write may block before the workload looks whether it shall stop.
const PATIENCE: Duration = Duration::from_millis(100);

static READ: AtomicU64 = AtomicU64::new(0);

fn main() -> Result<()> {
    let load = Load::start()?;
    let words: Vec<String> = env::args().collect();
    let bytes = match words.get(1..3) {
        Some([what, address]) if what == "listen" => listen(address, load)?,
        Some([what, address]) if what == "send" => send(address, load)?,
        _ => bail!("usage: pump listen|send ADDRESS:PORT"),
    };
    println!("{{\"bytes\":{bytes}}}");
    Ok(())
}

fn listen(address: &str, load: Load) -> Result<u64> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    listener.set_nonblocking(true)?;
    ready(&listener.local_addr()?.to_string())?;
    std::thread::scope(|scope| {
        while load.running() {
            match listener.accept() {
                Ok((stream, _)) => {
                    scope.spawn(move || sink_connection(stream, load));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error).context("accept a connection"),
            }
        }
        Ok(())
    })?;
    Ok(READ.load(Ordering::Relaxed))
}

/// Reads until the sender ends, or breaks off.
#[inline(never)]
fn sink_connection(mut stream: TcpStream, load: Load) {
    let mut buffer = vec![0; 1 << 16];
    let prepared = stream.set_nonblocking(false).and(stream.set_read_timeout(Some(PATIENCE)));
    while prepared.is_ok() && load.running() {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => drop(READ.fetch_add(read as u64, Ordering::Relaxed)),
            Err(error) if is_patience(error.kind()) => {}
            Err(_) => break,
        }
    }
}

fn send(address: &str, load: Load) -> Result<u64> {
    let mut stream =
        TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    ready(&stream.local_addr()?.to_string())?;
    pump_loop(&mut stream, load, Duration::from_millis(option("--pause-ms", 0)?))
}

#[inline(never)]
fn pump_loop(stream: &mut TcpStream, load: Load, pause: Duration) -> Result<u64> {
    let payload = vec![0x70; 1 << 16];
    let mut bytes = 0;
    while load.running() {
        bytes += black_box(send_payload(stream, &payload))?;
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    Ok(black_box(bytes))
}

#[inline(never)]
fn send_payload(stream: &mut TcpStream, payload: &[u8]) -> Result<u64> {
    let sent = match stream.write(black_box(payload)) {
        Ok(sent) => Ok(sent as u64),
        Err(error) if is_patience(error.kind()) => Ok(0),
        Err(error) => Err(error).context("send"),
    };
    black_box(sent)
}

/// What a socket says when its timeout passed or a signal came.
fn is_patience(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
