use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Api;
use kube::api::PostParams;

use crate::Cluster;
use crate::watch::chain;

/// Bytes of a token that is asked about; Kubernetes' own have about 1.2 KB.
const MAX_TOKEN: usize = 16 << 10;

/// A service account whose token the API server has verified.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Account {
    /// The account's namespace.
    pub namespace: String,
    /// The account's name.
    pub name: String,
}

/// Why a token proves nothing. Says nothing of the token's content.
#[derive(Debug, thiserror::Error)]
pub enum ReviewError {
    /// The server does not accept the token.
    #[error("the token is not accepted: {0}")]
    Refused(String),
    /// The server accepts it, but it is not a service account's.
    #[error("the token's user is not a service account")]
    Subject,
    /// The server cannot be asked.
    #[error("the API server cannot be asked for a review: {0}")]
    Unavailable(String),
}

impl Cluster {
    /// Asks the API server whose token this is; one of `audiences` must be the token's.
    ///
    /// # Errors
    /// When the server says no, or says nothing.
    pub async fn review_token(&self, token: &str, audiences: &[String]) -> Result<Account, ReviewError> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(ReviewError::Refused("it is empty or too long".into()));
        }
        let spec = TokenReviewSpec { audiences: Some(audiences.to_vec()), token: token.to_owned() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answered = api.create(&PostParams::default(), &review).await;
        let review = answered.map_err(|error| ReviewError::Unavailable(chain(&error)))?;
        account(&review.status.unwrap_or_default(), audiences)
    }
}

impl Cluster {
    /// Whether a service account may list the Secrets of its namespace.
    ///
    /// # Errors
    /// When the server does not say.
    pub async fn may_read_secrets(&self, account: &Account) -> Result<bool, ReviewError> {
        let spec = SubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(account.namespace.clone()),
                verb: Some("list".to_owned()),
                resource: Some("secrets".to_owned()),
                ..ResourceAttributes::default()
            }),
            user: Some(format!("system:serviceaccount:{}:{}", account.namespace, account.name)),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answered = api.create(&PostParams::default(), &review).await;
        let review = answered.map_err(|error| ReviewError::Unavailable(chain(&error)))?;
        Ok(review.status.is_some_and(|status| status.allowed))
    }
}

/// As istiod, security/pkg/k8s/tokenreview/k8sauthn.go `getTokenReviewResult`.
fn account(status: &TokenReviewStatus, audiences: &[String]) -> Result<Account, ReviewError> {
    if let Some(error) = status.error.as_deref().filter(|error| !error.is_empty()) {
        return Err(ReviewError::Refused(error.to_owned()));
    }
    if status.authenticated != Some(true) {
        return Err(ReviewError::Refused("the server does not know it".into()));
    }
    // A server that knows no audiences answers with none, and has not looked at them.
    let confirmed = status.audiences.iter().flatten().any(|audience| audiences.contains(audience));
    if !audiences.is_empty() && !confirmed {
        return Err(ReviewError::Refused("it is for another audience".into()));
    }
    let user = status.user.clone().unwrap_or_default();
    if !user.groups.iter().flatten().any(|group| group == "system:serviceaccounts") {
        return Err(ReviewError::Subject);
    }
    let name = user.username.unwrap_or_default();
    let mut parts = name.split(':');
    match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("system"), Some("serviceaccount"), Some(namespace), Some(name), None)
            if !namespace.is_empty() && !name.is_empty() =>
        {
            Ok(Account { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err(ReviewError::Subject),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn status(name: &str, group: &str, audience: &str) -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![audience.to_owned()]),
            error: None,
            user: Some(UserInfo {
                username: Some(name.to_owned()),
                groups: Some(vec![group.to_owned()]),
                ..UserInfo::default()
            }),
        }
    }

    #[test]
    fn only_a_service_account_with_our_audience_is_one() {
        let wanted = ["istio-ca".to_owned()];
        let (name, group) = ("system:serviceaccount:a:b", "system:serviceaccounts");
        let good = account(&status(name, group, "istio-ca"), &wanted).unwrap();
        assert_eq!(good, Account { namespace: "a".into(), name: "b".into() });
        assert!(account(&status(name, group, "vault"), &wanted).is_err());
        assert!(account(&status(name, "system:masters", "istio-ca"), &wanted).is_err());
        assert!(account(&status("system:serviceaccount:a", group, "istio-ca"), &wanted).is_err());
        assert!(account(&TokenReviewStatus::default(), &wanted).is_err());
    }
}
