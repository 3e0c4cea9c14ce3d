//! Signs workload certificates for authenticated callers; issues and verifies service account tokens.
//!
//! ```text
//!  CSR + token ─► service ─► Authenticate ─► SpiffeId ─► Authority::sign ─► chain
//! ```
//!
//! In: certificate signing requests, of which only the public key is used, and an identity that somebody
//! verified. Out: certificates, tokens, verified claims.
//! Never: an identity taken from a CSR; a private key or token in a log; listening on a socket.

mod authority;
mod pem;
mod rotation;
mod service;
mod token;

pub use authority::{Authority, AuthorityError, MAX_TTL, ServerCertificate, SignError, self_signed};
pub use service::{Authenticate, CertificateRequest, CertificateResponse, CertificateService, METHOD};
pub use token::{
    Claims, DEFAULT_AUDIENCE, DEFAULT_ISSUER, InvalidToken, TokenError, TokenIssuer, TokenRequest, TokenVerifier,
};
