//! Which pages may use a bus: those of its own site, and of origins that its owner allows (RFC 6454, WHATWG Fetch).

use super::error::Error;
use super::request::Request;
use super::response::Response;
use crate::config::Config;
use crate::limits;
use crate::variables::Variables;

/// The methods that a bus knows.
pub const METHODS: &str = "GET, HEAD, POST, OPTIONS";

/// Refuses what a foreign page asks for: a bus on an intranet must not be writable by any page on the internet that its
/// user visits. A request without Origin does not come from a page.
///
/// # Errors
/// [`Error::ForeignOrigin`].
pub fn check(request: &Request, config: &Config) -> Result<(), Error> {
    let variables = request.variables;
    let Some(origin) = variables("HTTP_ORIGIN") else {
        return Ok(());
    };
    // No page can set Sec-Fetch-Site (W3C Fetch Metadata), and it is right also where a proxy rewrote Host.
    let same =
        variables("HTTP_SEC_FETCH_SITE").is_some_and(|site| site == b"same-origin") || is_host(variables, &origin);
    if same || allowed(config, &origin).is_some() {
        return Ok(());
    }
    Err(Error::ForeignOrigin(String::from_utf8_lossy(&origin).into_owned()))
}

/// Whether the origin is this host, whatever the scheme: behind a proxy that speaks https we are asked by http.
///
/// Debian's fastcgi_params for nginx leave the port out of Host; then SERVER_PORT may stand in for it.
fn is_host(variables: Variables, origin: &[u8]) -> bool {
    let scheme = |scheme: &&[u8]| origin.strip_prefix(*scheme);
    let Some(authority) = [&b"http://"[..], b"https://"].iter().find_map(scheme).map(without_default_port) else {
        return false;
    };
    let host = variables("HTTP_HOST").unwrap_or_default();
    let with_port = || [&host[..], b":", &variables("SERVER_PORT").unwrap_or_default()].concat();
    !host.is_empty() && (authority == without_default_port(&host) || authority == without_default_port(&with_port()))
}

/// A host in lower case, without a port that is the default one of http or https.
fn without_default_port(host: &[u8]) -> Vec<u8> {
    let mut host = host.to_ascii_lowercase();
    let port = [&b":80"[..], b":443"].into_iter().find(|port| host.ends_with(port));
    host.truncate(host.len() - port.map_or(0, <[u8]>::len));
    host
}

/// The value of Access-Control-Allow-Origin for this origin, if it has one.
fn allowed<'a>(config: &'a Config, origin: &[u8]) -> Option<&'a String> {
    config.allow_origin.iter().find(|allowed| *allowed == "*" || allowed.as_bytes() == origin)
}

/// Lets an allowed page read the reply, errors and our headers included.
pub fn allow(variables: Variables, config: &Config, response: &mut Response) {
    if config.allow_origin.is_empty() {
        return;
    }
    response.header("Vary", "Origin");
    let Some(origin) = variables("HTTP_ORIGIN").and_then(|origin| allowed(config, &origin)) else {
        return;
    };
    response.header("Access-Control-Allow-Origin", origin);
    if response.is_no_content() {
        response.header("Access-Control-Allow-Methods", METHODS);
        response.header("Access-Control-Allow-Headers", "Content-Type");
        response.header("Access-Control-Max-Age", limits::PREFLIGHT_AGE);
    } else {
        response.header("Access-Control-Expose-Headers", "Shortbus-Last-Id, Shortbus-Missed, Retry-After, Date");
    }
}
