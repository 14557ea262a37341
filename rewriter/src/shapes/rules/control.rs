//! What has no tensor rule: control flow, sequences, strings, recurrences, training, and operators of language models.

use super::*;

const fn none(name: &'static str, why: &'static str) -> Op {
    op(name, Shape::Open(why), Axis::Lost(why))
}

const fn none_ms(name: &'static str, why: &'static str) -> Op {
    ms(name, Shape::Open(why), Axis::Lost(why))
}

const SEQUENCE: &str = "a sequence of tensors, not a tensor";
const TEXT: &str = "works on text";
const RECURRENT: &str = "a recurrence over tokens, no part of a transformer";
const LOSS: &str = "a loss, of training only";
const DECODING: &str = "a whole language model's decoding";
const STREAMS: &str = "streams of a language model's hyper-connections";

pub(super) const OPS: &[Op] = &[
    op(
        "If",
        Shape::Open("its branches are walked instead"),
        Axis::Lost("a branch is not followed"),
    ),
    none("Loop", "its body is not walked"),
    none("Scan", "its body is not walked"),
    none("SequenceMap", SEQUENCE),
    none("SequenceAt", SEQUENCE),
    none("SequenceConstruct", SEQUENCE),
    none("SequenceEmpty", SEQUENCE),
    none("SequenceErase", SEQUENCE),
    none("SequenceInsert", SEQUENCE),
    none("SequenceLength", SEQUENCE),
    none("ConcatFromSequence", SEQUENCE),
    none("SplitToSequence", SEQUENCE),
    none("Optional", SEQUENCE),
    none("OptionalGetElement", SEQUENCE),
    none("OptionalHasElement", SEQUENCE),
    none("StringConcat", TEXT),
    none("StringNormalizer", TEXT),
    none("StringSplit", TEXT),
    none("RegexFullMatch", TEXT),
    none("TfIdfVectorizer", TEXT),
    none_ms("Tokenizer", TEXT),
    none_ms("WordConvEmbedding", TEXT),
    none_ms("MurmurHash3", TEXT),
    none("ImageDecoder", "works on files"),
    none("GRU", RECURRENT),
    none("LSTM", RECURRENT),
    none("RNN", RECURRENT),
    none_ms("AttnLSTM", RECURRENT),
    none_ms("DynamicQuantizeLSTM", RECURRENT),
    none_ms("Mamba2Verify", RECURRENT),
    none_ms("ConvStateReplay", RECURRENT),
    none_ms("GatedDeltaNetStateReplay", RECURRENT),
    none("NegativeLogLikelihoodLoss", LOSS),
    none("SoftmaxCrossEntropyLoss", LOSS),
    none_ms("BeamSearch", DECODING),
    none_ms("WhisperBeamSearch", DECODING),
    none_ms("GreedySearch", DECODING),
    none_ms("Sampling", DECODING),
    none_ms("BifurcationDetector", DECODING),
    none_ms("SpeculativePrefixCommit", DECODING),
    none_ms("NGramRepeatBlock", DECODING),
    none_ms("NGramHashMapping", DECODING),
    none_ms("VarlenNGramHashMapping", DECODING),
    none_ms("DynamicTimeWarping", "aligns speech with text"),
    none_ms("EngramGate", STREAMS),
    none_ms("HyperConnectionLowRankMix", STREAMS),
    none_ms("HyperConnectionPostMix", STREAMS),
    none_ms("HyperConnectionPreMix", STREAMS),
    none_ms("EmbedLayerNormalization", "a text encoder's embeddings"),
    none_ms("QEmbedLayerNormalization", "a text encoder's embeddings"),
    none_ms("TorchEmbedding", "an embedding with options of its own"),
    none_ms("EPContext", "a provider's compiled graph"),
    none_ms("Snpe", "a provider's compiled graph"),
    none_ms("SampleOp", "an example of an operator"),
];
