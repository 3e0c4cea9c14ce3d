//! Which JSON Web Tokens a request may carry.

use crate::selector::PolicyTargetReference;
use crate::selector::WorkloadSelector;
use crate::wire::Duration;
use crate::wire::message;

message! {
    /// `security.v1beta1.RequestAuthentication`.
    RequestAuthentication {
        selector: Option<WorkloadSelector>,
        target_ref "targetRef": Option<PolicyTargetReference>,
        target_refs "targetRefs": Vec<PolicyTargetReference>,
        jwt_rules "jwtRules": Vec<JwtRule>,
    }
}

message! {
    /// `security.v1beta1.JWTRule`.
    JwtRule {
        issuer: String,
        audiences: Vec<String>,
        jwks_uri "jwksUri": String,
        jwks: String,
        from_headers "fromHeaders": Vec<JwtHeader>,
        from_params "fromParams": Vec<String>,
        output_payload_to_header "outputPayloadToHeader": String,
        from_cookies "fromCookies": Vec<String>,
        forward_original_token "forwardOriginalToken": bool,
        output_claim_to_headers "outputClaimToHeaders": Vec<ClaimToHeader>,
        timeout: Option<Duration>,
        space_delimited_claims "spaceDelimitedClaims": Vec<String>,
    }
}

message! {
    /// `security.v1beta1.JWTHeader`.
    JwtHeader {
        name: String,
        prefix: String,
    }
}

message! {
    /// `security.v1beta1.ClaimToHeader`.
    ClaimToHeader {
        header: String,
        claim: String,
    }
}
