//! The few calls of etcd 3 that a store needs, through its JSON gateway (`/v3/…`, bytes in base64, 64-bit numbers as
//! text), which every etcd server has on its client port.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use ureq::Agent;

use super::error::Error;

/// A server that does not take a connection in this time is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// No call here waits for anything on the server but its disk.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// How long keys outlive their process.
pub(super) const TTL: Duration = Duration::from_secs(30);

/// A key and its value.
pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// A server. Cloning shares its connections.
#[derive(Clone)]
pub(super) struct Etcd {
    address: String,
    agent: Agent,
}

impl Etcd {
    /// The server at `address`, which is not asked anything yet.
    ///
    /// # Errors
    /// [`Error::Coordinator`] where that is no `http://HOST:PORT`.
    pub(super) fn new(address: &str) -> Result<Etcd, Error> {
        let wrong = |what| Error::Coordinator { found: address.into(), what };
        if address.starts_with("https://") {
            return Err(wrong(
                "only plain http is spoken; put a proxy with TLS on this machine and give its address, or keep etcd in \
                 the job's own network",
            ));
        }
        let host_and_port = address.strip_prefix("http://").map(|a| a.trim_end_matches('/')).unwrap_or_default();
        let port = host_and_port.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
        if port.and_then(|p| p.parse::<u16>().ok()).is_none() || host_and_port.contains(['/', ',', ' ']) {
            return Err(wrong("must be the address of one etcd server, as http://HOST:2379"));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The server is inside the job: a proxy for the world outside does not know it.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(CALL_TIMEOUT))
            .build();
        Ok(Etcd { address: format!("http://{host_and_port}"), agent: config.new_agent() })
    }

    /// `http://HOST:PORT`.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Sets a key, which goes away with the lease.
    pub(super) fn put(&self, key: &[u8], value: &[u8], lease: i64) -> Result<(), Error> {
        const PATH: &str = "/v3/kv/put";
        const NO_LEASE: &str = "requested lease not found";
        let body = json!({ "key": encode(key), "value": encode(value), "lease": lease.to_string() });
        match self.post(PATH, &body) {
            Ok(_) => Ok(()),
            Err(Error::Answer { address, answer, .. }) if answer.contains(NO_LEASE) => {
                Err(Error::LeaseOver { address, ttl: TTL })
            }
            Err(e) => Err(e),
        }
    }

    /// The value of a key, where it has one.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.range(&json!({ "key": encode(key) }))?.pop().map(|(_, value)| value))
    }

    /// All keys that begin with `prefix`, with their values.
    pub(super) fn get_prefix(&self, prefix: &[u8]) -> Result<Vec<Pair>, Error> {
        self.range(&json!({ "key": encode(prefix), "range_end": encode(&after_prefix(prefix)) }))
    }

    fn range(&self, body: &Value) -> Result<Vec<Pair>, Error> {
        const PATH: &str = "/v3/kv/range";
        let answer = self.post(PATH, body)?;
        // What is empty is left out.
        let Some(found) = answer.get("kvs") else { return Ok(Vec::new()) };
        let bytes = |pair: &Value, name| decode(pair.get(name).map_or(Some(""), Value::as_str)?);
        let pairs = found.as_array().map(|a| a.iter().map(|p| Some((bytes(p, "key")?, bytes(p, "value")?))));
        pairs.and_then(Iterator::collect).ok_or_else(|| self.unexpected(PATH, &answer))
    }

    /// A new lease: keys put with it go away [`TTL`] after it was last kept alive.
    pub(super) fn grant_lease(&self) -> Result<i64, Error> {
        const PATH: &str = "/v3/lease/grant";
        let answer = self.post(PATH, &json!({ "TTL": TTL.as_secs().to_string() }))?;
        integer(&answer["ID"]).ok_or_else(|| self.unexpected(PATH, &answer))
    }

    /// Begins the time of a lease again; false where it is over already.
    pub(super) fn keep_lease_alive(&self, lease: i64) -> Result<bool, Error> {
        const PATH: &str = "/v3/lease/keepalive";
        let answer = self.post(PATH, &json!({ "ID": lease.to_string() }))?;
        match answer.get("result") {
            Some(result) => Ok(integer(&result["TTL"]).is_some_and(|ttl| ttl > 0)),
            None => Err(self.unexpected(PATH, &answer)),
        }
    }

    fn post(&self, path: &'static str, body: &Value) -> Result<Value, Error> {
        let unreachable = |e: ureq::Error| Error::Unreachable { address: self.address.clone(), reason: e.to_string() };
        let request = self.agent.post(format!("{}{path}", self.address)).content_type("application/json");
        let mut response = request.send(body.to_string()).map_err(unreachable)?;
        let status = response.status();
        let text = response.body_mut().read_to_string().map_err(unreachable)?;
        let answer: Option<Value> = serde_json::from_str(text.trim()).ok();
        match answer {
            Some(answer) if status.is_success() => Ok(answer),
            // etcd's own words where it has some.
            answer => {
                let said = answer.as_ref().and_then(|a| a["error"].as_str()).unwrap_or(text.trim());
                let answer = format!("{status}: {}", said.chars().take(200).collect::<String>());
                Err(Error::Answer { address: self.address.clone(), path, answer })
            }
        }
    }

    fn unexpected(&self, path: &'static str, answer: &Value) -> Error {
        let answer = answer.to_string().chars().take(200).collect();
        Error::Answer { address: self.address.clone(), path, answer }
    }
}

fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn decode(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// A 64-bit number, which JSON has as text.
fn integer(value: &Value) -> Option<i64> {
    value.as_str()?.parse().ok()
}

/// The first key after all that begin with `prefix`; `\0`, which means no end, where there is none.
fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_plain_http_with_a_port() {
        for right in ["http://127.0.0.1:2379", "http://head-node:2379/", "http://[::1]:2379"] {
            assert_eq!(Etcd::new(right).unwrap().address(), right.trim_end_matches('/'));
        }
        for wrong in ["127.0.0.1:2379", "http://host", "http://:2379", "http://a:1,http://b:1", "http://a:1/v3", ""] {
            let error = Etcd::new(wrong).err().expect(wrong).to_string();
            assert!(error.contains("as http://HOST:2379"), "{error}");
        }
        let error = Etcd::new("https://host:2379").err().expect("TLS").to_string();
        assert!(error.contains("only plain http"), "{error}");
    }

    #[test]
    fn a_prefix_ends_where_the_next_one_begins() {
        assert_eq!(after_prefix(b"/job/"), b"/job0");
        assert_eq!(after_prefix(b"a\xff\xff"), b"b");
        assert_eq!(after_prefix(b"\xff"), b"\0");
    }

    #[test]
    fn a_server_that_is_not_there_is_named_at_once() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = Etcd::new(&format!("http://{free}")).unwrap().get(b"key").unwrap_err();
        assert!(matches!(&error, Error::Unreachable { .. }), "{error}");
        let error = error.to_string();
        assert!(error.contains(&free.to_string()) && error.contains("start it, or correct --coordinator"), "{error}");
    }
}
