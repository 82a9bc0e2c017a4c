//! Which pages may use a bus: those of its own site, and of origins that its owner allows (RFC 6454, WHATWG Fetch).

use std::borrow::Cow;

use super::error::Error;
use super::request::Request;
use super::response::Response;
use crate::config::Config;
use crate::limits;
use crate::variables::Variables;

/// The methods that a bus knows.
pub const METHODS: &str = "GET, HEAD, POST, OPTIONS";

/// Refuses what a foreign page asks for: a bus on an intranet must not be writable by any page on the internet that its
/// user visits. A request with none of the headers that are looked at here does not come from a page, or comes by a
/// server that does not hand them on.
///
/// # Errors
/// [`Error::ForeignOrigin`].
pub fn check(request: &Request, config: &Config) -> Result<(), Error> {
    let variables = request.variables;
    let origin = variables.get("HTTP_ORIGIN");
    if origin.is_some_and(|origin| allowed(config, origin).is_some()) {
        return Ok(());
    }
    // No page can set Sec-Fetch-Site (W3C Fetch Metadata), and it is right also where a proxy rewrote Host. Where it is,
    // nothing else counts: over plain http a host's name is easily forged.
    let is_own = match variables.get("HTTP_SEC_FETCH_SITE") {
        Some(site) => matches!(site, b"same-origin" | b"none"),
        // Some servers give a header that did not come without a value.
        None => match (origin, variables.get("HTTP_REFERER").filter(|referer| !referer.is_empty())) {
            (Some(origin), _) => is_host(variables, origin),
            // Some servers hand on no Origin.
            (None, Some(referer)) => {
                let origin = origin_of(referer);
                is_host(variables, origin) || allowed(config, origin).is_some()
            }
            (None, None) => true,
        },
    };
    if is_own {
        return Ok(());
    }
    let text = |name| String::from_utf8_lossy(variables.text(name)).into_owned();
    let headers = [("Origin", "HTTP_ORIGIN"), ("Referer", "HTTP_REFERER"), ("Sec-Fetch-Site", "HTTP_SEC_FETCH_SITE")];
    let told = headers.into_iter().map(|(header, name)| (header, text(name))).find(|(_, value)| !value.is_empty());
    let (header, value) = told.unwrap_or(("Origin", String::new()));
    Err(Error::ForeignOrigin { header, value, host: text("HTTP_HOST") })
}

/// The origin in a URL.
fn origin_of(url: &[u8]) -> &[u8] {
    let authority = url.windows(3).position(|three| three == b"://").map_or(url.len(), |at| at + 3);
    let end = url[authority..].iter().position(|byte| b"/?#".contains(byte));
    &url[..end.map_or(url.len(), |end| authority + end)]
}

/// Whether the origin is this host, by the scheme that the server tells of.
///
/// Debian's fastcgi_params for nginx leave the port out of Host; then SERVER_PORT may stand in for it.
fn is_host(variables: &Variables, origin: &[u8]) -> bool {
    let (authority, secure) = match (origin.strip_prefix(b"http://"), origin.strip_prefix(b"https://")) {
        (Some(authority), _) => (without_default_port(authority), false),
        (_, Some(authority)) => (without_default_port(authority), true),
        _ => return false,
    };
    let host = match variables.text("HTTP_HOST") {
        // HTTP/3 has no Host header, and nginx 1.25 makes none of what it has in its place.
        b"" => variables.text("SERVER_NAME"),
        host => host,
    };
    let with_port = || [host, b":", variables.text("SERVER_PORT")].concat();
    !host.is_empty()
        && is_secure(variables).is_none_or(|is_secure| is_secure == secure)
        && (authority == without_default_port(host) || authority == without_default_port(&with_port()))
}

/// Whether the client came by https, where that is known. A proxy that speaks https asks us by http, and may say so: no
/// foreign page can set a header of such a name.
fn is_secure(variables: &Variables) -> Option<bool> {
    let scheme = match variables.text("HTTP_X_FORWARDED_PROTO") {
        b"" => variables.text("REQUEST_SCHEME"),
        forwarded => forwarded,
    };
    match scheme {
        b"https" => Some(true),
        b"http" => Some(false),
        _ if variables.text("HTTPS").eq_ignore_ascii_case(b"on") => Some(true),
        _ => None,
    }
}

/// A host in lower case, without a port that is the default one of http or https.
fn without_default_port(host: &[u8]) -> Vec<u8> {
    let mut host = host.to_ascii_lowercase();
    let port = [&b":80"[..], b":443"].into_iter().find(|port| host.ends_with(port));
    host.truncate(host.len() - port.map_or(0, <[u8]>::len));
    host
}

/// The value of Access-Control-Allow-Origin for this origin, if it has one: the origin, where it is named.
fn allowed<'a>(config: &'a Config, origin: &[u8]) -> Option<&'a String> {
    let find = |wanted: &[u8]| config.allow_origin.iter().find(|allowed| allowed.as_bytes() == wanted);
    find(origin).or_else(|| find(b"*"))
}

/// Lets an allowed page read the reply, errors and our headers included. A page of an origin that is named may send
/// whatever headers it likes, and its user's credentials for the site.
pub fn allow(variables: &Variables, config: &Config, response: &mut Response) {
    if config.allow_origin.is_empty() {
        return;
    }
    let preflight = response.is_no_content();
    response.header("Vary", if preflight { "Origin, Access-Control-Request-Headers" } else { "Origin" });
    let Some(origin) = variables.get("HTTP_ORIGIN").and_then(|origin| allowed(config, origin)) else {
        return;
    };
    response.header("Access-Control-Allow-Origin", origin);
    if origin != "*" {
        response.header("Access-Control-Allow-Credentials", true);
    }
    if preflight {
        response.header("Access-Control-Allow-Methods", METHODS);
        response.header("Access-Control-Allow-Headers", allowed_headers(variables, origin));
        response.header("Access-Control-Max-Age", limits::PREFLIGHT_AGE);
    } else {
        response.header("Access-Control-Expose-Headers", "Shortbus-Last-Id, Shortbus-Missed, Retry-After, Date");
    }
}

/// The request headers that a page of an allowed origin may send.
fn allowed_headers<'a>(variables: &Variables<'a>, origin: &str) -> Cow<'a, str> {
    let asked = String::from_utf8_lossy(variables.text("HTTP_ACCESS_CONTROL_REQUEST_HEADERS"));
    // Names of headers (RFC 9110 section 5.1) and what divides a list of them.
    let is_list = |byte: u8| byte.is_ascii_alphanumeric() || b"-_, ".contains(&byte);
    match origin {
        // Without credentials the star stands for all but Authorization.
        "*" => "Content-Type, Last-Event-ID, *".into(),
        _ if asked.is_empty() || !asked.bytes().all(is_list) => "Content-Type, Last-Event-ID".into(),
        _ => asked,
    }
}
