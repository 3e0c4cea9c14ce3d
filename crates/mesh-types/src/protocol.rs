use std::fmt;

/// What a service port speaks, as istiod's `protocol.Instance`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Protocol {
    /// Opaque bytes.
    Tcp,
    /// Datagrams; ignored by sidecars.
    Udp,
    /// HTTP/1.1.
    Http,
    /// HTTP/2 in clear text.
    Http2,
    /// gRPC, so HTTP/2.
    Grpc,
    /// gRPC-Web, so HTTP/1.1.
    GrpcWeb,
    /// TLS with HTTP inside, passed through by SNI.
    Https,
    /// TLS with anything inside, passed through by SNI.
    Tls,
    /// MongoDB, handled as TCP.
    Mongo,
    /// Redis, handled as TCP.
    Redis,
    /// MySQL: the server speaks first.
    MySql,
    /// HTTP CONNECT tunnels of the ambient mesh.
    Hbone,
    /// Not declared: the proxy sniffs HTTP.
    Unsupported,
}

impl Protocol {
    /// The protocol that a name such as `http` or `GRPC-Web` means (istiod `protocol.Parse`).
    pub fn parse(name: &str) -> Protocol {
        match name.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "http" => Protocol::Http,
            "http2" => Protocol::Http2,
            "grpc" => Protocol::Grpc,
            "grpc-web" => Protocol::GrpcWeb,
            "https" => Protocol::Https,
            "tls" => Protocol::Tls,
            "mongo" => Protocol::Mongo,
            "redis" => Protocol::Redis,
            "mysql" => Protocol::MySql,
            "hbone" | "double-hbone" => Protocol::Hbone,
            _ => Protocol::Unsupported,
        }
    }

    /// The protocol of a Kubernetes service port (istiod `kube.ConvertProtocol`): UDP first, then
    /// `appProtocol`, then the port name's part before the first `-`, then well-known server-first ports.
    pub fn of_service_port(port: u16, name: &str, transport: &str, app_protocol: Option<&str>) -> Protocol {
        if transport.eq_ignore_ascii_case("UDP") {
            return Protocol::Udp;
        }
        let name = match app_protocol {
            // KEP-3726 and the older Kubernetes spellings.
            Some("kubernetes.io/h2c") => "http2",
            Some("kubernetes.io/ws") => return Protocol::Http,
            Some("kubernetes.io/wss") => return Protocol::Https,
            Some(other) => other,
            None => name,
        };
        let full = name.to_ascii_lowercase();
        if full.starts_with("grpc-web") {
            return Protocol::GrpcWeb;
        }
        let protocol = Protocol::parse(full.split('-').next().unwrap_or(""));
        match protocol {
            // A name that says nothing on a port whose server is known to speak first: sniffing would hang.
            // SMTP, DNS, MySQL, MongoDB, as istiod has them.
            Protocol::Unsupported if matches!(port, 25 | 53 | 3306 | 27017) => Protocol::Tcp,
            other => other,
        }
    }

    /// HTTP that a proxy may parse without terminating TLS.
    pub fn is_http(self) -> bool {
        matches!(self, Protocol::Http | Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb)
    }

    /// HTTP/2 in clear text.
    pub fn is_http2(self) -> bool {
        matches!(self, Protocol::Http2 | Protocol::Grpc | Protocol::GrpcWeb)
    }

    /// Handled as opaque TCP, TLS included.
    pub fn is_tcp(self) -> bool {
        matches!(
            self,
            Protocol::Tcp | Protocol::Https | Protocol::Tls | Protocol::Mongo | Protocol::Redis | Protocol::MySql
        )
    }

    /// TLS that passes through.
    pub fn is_tls(self) -> bool {
        matches!(self, Protocol::Https | Protocol::Tls)
    }

    /// The proxy has to look at the bytes.
    pub fn is_unsupported(self) -> bool {
        self == Protocol::Unsupported
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Http => "HTTP",
            Protocol::Http2 => "HTTP2",
            Protocol::Grpc => "GRPC",
            Protocol::GrpcWeb => "GRPC-Web",
            Protocol::Https => "HTTPS",
            Protocol::Tls => "TLS",
            Protocol::Mongo => "Mongo",
            Protocol::Redis => "Redis",
            Protocol::MySql => "MySQL",
            Protocol::Hbone => "HBONE",
            Protocol::Unsupported => "UnsupportedProtocol",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_app_protocol_decide() {
        let of = |port, name, app| Protocol::of_service_port(port, name, "TCP", app);
        assert_eq!(of(80, "http-web", None), Protocol::Http);
        assert_eq!(of(80, "grpc-web-x", None), Protocol::GrpcWeb);
        assert_eq!(of(80, "grpc", None), Protocol::Grpc);
        assert_eq!(of(80, "web", None), Protocol::Unsupported);
        assert_eq!(of(80, "tcp", Some("http")), Protocol::Http);
        assert_eq!(of(80, "", Some("kubernetes.io/h2c")), Protocol::Http2);
        assert_eq!(of(80, "", Some("kubernetes.io/ws")), Protocol::Http);
        assert_eq!(of(27017, "mongo", Some("kubernetes.io/wss")), Protocol::Https);
        assert_eq!(of(80, "grpc-webx", None), Protocol::GrpcWeb);
        assert_eq!(of(80, "udp-x", None), Protocol::Udp);
        assert_eq!(of(3306, "db", None), Protocol::Tcp);
        assert_eq!(Protocol::of_service_port(53, "http", "UDP", None), Protocol::Udp);
    }
}
