// Which keys a query sees in the band, one by one and in blocks.
#pragma once
#include "device.cuh"

/// Which side of the band one main loop over the keys takes.
enum BandSide {
    /// All of them.
    ALL = 0,
    /// Those inside the band.
    INSIDE = 1,
    /// The others.
    OUTSIDE = 2,
};

struct BandView {
    int half_width, text_begin, text_end, tokens;

    DEVICE bool is_text(int token) const { return token >= text_begin && token < text_end; }

    DEVICE bool sees(int query, int key) const {
        int apart = query - key;
        return (apart <= half_width && -apart <= half_width) || is_text(query) || is_text(key);
    }

    /// Whether a query of [q0, q1) sees a key of [k0, k1). May say yes where the truth is no.
    DEVICE bool intersects(int q0, int q1, int k0, int k1) const {
        bool text = text_begin < text_end &&
                    ((q0 < text_end && q1 > text_begin) || (k0 < text_end && k1 > text_begin));
        return text || (k0 - (q1 - 1) <= half_width && q0 - (k1 - 1) <= half_width);
    }

    /// Whether every query of [q0, q1) sees every key of [k0, k1). May say no where the truth is yes.
    DEVICE bool covers(int q0, int q1, int k0, int k1) const {
        bool text = (q0 >= text_begin && q1 <= text_end) || (k0 >= text_begin && k1 <= text_end);
        return text || ((k1 - 1) - q0 <= half_width && (q1 - 1) - k0 <= half_width);
    }
};
