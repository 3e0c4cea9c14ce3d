//! Dates as answers carry them.

use proxy_core::format::TimeFormat;
use std::cell::RefCell;
use std::time::SystemTime;

/// The date of answers, as RFC 9110 wants it (`Sun, 06 Nov 1994 08:49:37 GMT`), made once a second.
pub(super) fn http_date<T>(now: SystemTime, take: impl FnOnce(&[u8]) -> T) -> T {
    thread_local! {
        static LAST: RefCell<(u64, Vec<u8>)> = const { RefCell::new((0, Vec::new())) };
    }
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    LAST.with_borrow_mut(|(at, text)| {
        if *at != seconds || text.is_empty() {
            *at = seconds;
            text.clear();
            TimeFormat::parse("%a, %d %b %Y %T GMT").write(now, text);
        }
        take(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_rfc9110() {
        for (at, text) in
            [(784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"), (1_709_164_800, "Thu, 29 Feb 2024 00:00:00 GMT")]
        {
            http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(at), |date| assert_eq!(date, text.as_bytes()));
        }
    }
}
