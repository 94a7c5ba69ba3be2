// What the bindings of torch and NumPy share: guards, and how work is shared among threads.
#include <atomic>
#include <stdexcept>

#include "cpu/share_out.h"
#include "harness.h"
#include "tensors.h"

namespace {

Array array(const Shape& shape, std::string dtype = "float32") {
  static int64_t somewhere[4096];
  return {somewhere, std::move(dtype), "cpu", shape, contiguous(shape)};
}

template <class Call>
void refuses(const std::string& words, const Call& call) {
  try {
    call();
    report("nothing was refused, and should have been: ", words);
  } catch (const std::runtime_error& error) {
    if (error.what() != words) report(error.what(), " is not ", words);
  }
}

TEST(guards_refuse_logits) {
  const Guard guard("op", "cpu");
  const Array good = array({2, 8, 64}), narrow = array({2, 8, 0});
  const auto pair = [&](const Array& student, const Array& teacher, std::optional<int64_t> vocab_size = {}) {
    return guard.logits_pair(student, teacher, 1, 1, vocab_size, true).first;
  };
  const auto one = [&](const Array& logits, std::optional<int64_t> vocab_size = {}) {
    return guard.one_logits(logits, .5, vocab_size);
  };
  CHECK(pair(good, array({2, 8, 72}, "bfloat16"), 60).vocab_size == 60);
  const Logits whole = one(array({2, 8, 64}, "float16"));
  CHECK(whole.vocab_size == 64 && whole.temperature == .5 && whole.rows.step == 1 && whole.rows.at.count() == 16);
  Array strided = good, elsewhere = good, column = array({2, 8, 1});
  strided.strides.back() = 2;
  elsewhere.device = "cuda:0";
  column.strides.back() = 7;
  CHECK(one(column).rows.step == 1);

  refuses("op: logits must have shape [..., V], got []", [&] { one(array({})); });
  refuses("op: logits must have dtype float32, bfloat16 or float16, got int64", [&] { one(array({8, 64}, "int64")); });
  refuses("op: logits must have stride 1 on its last axis, got 2", [&] { one(strided); });
  refuses("op: logits must be on cpu, got cuda:0", [&] { one(elsewhere); });
  refuses("op: vocab_size must be between 1 and the logits' width = 64, got 65", [&] { one(good, 65); });
  refuses("op: vocab_size must be between 1 and the logits' width = 0, got 0", [&] { one(narrow); });
  refuses("op: student_logits must have shape [B, T, V] or [N, V], got [3]", [&] { pair(array({3}), good); });
  refuses("op: teacher_logits must have shape [2, 8, V], got [2, 7, 64]", [&] { pair(good, array({2, 7, 64})); });
  refuses("op: teacher_logits must have shape [2, 8, V], got [64]", [&] { pair(good, array({64})); });
  refuses("op: vocab_size must be given when the last axes of student_logits and teacher_logits differ, got 64 and 72",
          [&] { pair(good, array({2, 8, 72})); });
  refuses("op: vocab_size must be between 1 and min(student, teacher) width = 64, got 65",
          [&] { pair(good, array({2, 8, 72}), 65); });
  refuses("op: vocab_size must be between 1 and min(student, teacher) width = 0, got 0", [&] { pair(narrow, narrow); });
  guard.check_k(0, 5000, /*least=*/0);
  refuses("op: k must be between 1 and min(vocab_size, 256) = 64, got 65", [&] { guard.check_k(65, 64); });
  refuses("op: k must be between 1 and min(vocab_size, 256) = 256, got 0", [&] { guard.check_k(0, 5000); });
}

TEST(guards_refuse_what_goes_with_positions) {
  const Guard guard("op", "cpu");
  CHECK(!guard.values("mask", std::nullopt, {2, 8}, kMask));
  for (const std::string_view dtype : kMask.names)
    CHECK(guard.values("mask", array({2, 8}, std::string(dtype)), {2, 8}, kMask));
  Array column = array({2, 8, 4}, "int64");
  column.strides = {1, 2, 16};
  const View rows = guard.rows("teacher_topk_ids", column, {2, 8, 4}, kIds);
  CHECK(rows.step == 16 && rows.at.count() == 16 && rows.at.offset(9) == 3);

  refuses("op: mask must have shape [2, 8], got [8]", [&] { guard.values("mask", array({8}), {2, 8}, kMask); });
  refuses("op: mask must have dtype bool, integer or float, got complex64",
          [&] { guard.values("mask", array({2, 8}, "complex64"), {2, 8}, kMask); });
  refuses("op: state must have shape [2, 8, 5], got [2, 8, 2]",
          [&] { guard.rows("state", array({2, 8, 2}), {2, 8, 5}, kState); });
  for (const auto& [shape, words] :
       std::vector<std::pair<Shape, std::string>>{{{4, 257}, "[4, 257]"}, {{4, 0}, "[4, 0]"}, {{4}, "[4]"}})
    refuses("op: ids must have shape [B, T, k] or [N, k] with 1 <= k <= 256, got " + words,
            [&] { guard.topk_ids("ids", array(shape, "int64")); });
  for (const auto& [shape, words] : std::vector<std::pair<Shape, std::string>>{
           {{8, 513}, "[8, 513]"}, {{8, 0}, "[8, 0]"}, {{7, 4}, "[7, 4]"}, {{8}, "[8]"}})
    refuses("op: ids must have shape [8, m] with 1 <= m <= 512, got " + words,
            [&] { guard.ids("ids", array(shape, "int64"), {8}, 512, "m"); });
  refuses("op: drift must have shape [B, T] or [N], got []", [&] { guard.drift(array({}, "bool")); });
}

TEST(guards_refuse_layouts_and_words) {
  const Guard guard("op", "cpu");
  const auto layout = [&](const Shape& positions, const MaybeArray& starts) {
    return guard.responses(positions, starts, "drift is [N]", "drift is [B, T]");
  };
  const Array starts = array({3}, "int32");
  CHECK(layout({7}, starts).count == 2 && layout({7}, starts).positions == 7);
  CHECK(layout({3, 5}, std::nullopt).count == 3 && layout({3, 5}, std::nullopt).positions == 15);
  refuses("op: cu_seqlens must be given when drift is [N], got None", [&] { layout({7}, std::nullopt); });
  refuses("op: cu_seqlens must be None when drift is [B, T], got shape [3]", [&] { layout({7, 1}, starts); });
  refuses("op: cu_seqlens must have shape [B + 1], got [0]", [&] { layout({7}, array({0}, "int32")); });
  refuses("op: cu_seqlens must have shape [B + 1], got [1, 2]", [&] { layout({7}, array({1, 2}, "int32")); });

  refuses("op: metric must be one of 'overlap', 'top_p', got 'x'", [&] { guard.metric("x"); });
  refuses("op: reward_weight must be one of 'student', 'teacher', 'none', got ''", [&] { guard.reward_weight(""); });
  guard.check_given_for_top_p({guard.metric("overlap")}, "token_ids", std::nullopt);
  refuses("op: token_ids must be given when metric is 'top_p', got None",
          [&] { guard.check_given_for_top_p({guard.metric("top_p")}, "token_ids", std::nullopt); });
}

TEST(work_is_shared_out_once) {
  for (const int64_t count : {0, 1, 2, 7, 100, 5000})
    for (const int64_t grain : {0, 1, 3, 64, 10000})
      for (const int64_t threads : {1, 2, 5}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
        std::atomic<int64_t> short_blocks = 0;
        share_out(
            count, grain, threads,
            [&](int64_t begin, int64_t end) {
              CHECK(begin < end && end <= count);
              short_blocks += end - begin < grain;
              for (int64_t n = begin; n < end; ++n) ++visits[static_cast<size_t>(n)];
            },
            start_threads);
        for (const std::atomic<int>& visit : visits) CHECK(visit == 1);
        CHECK(short_blocks <= 1);
      }
}

TEST(an_exception_leaves_no_thread) {
  std::atomic<int64_t> done = 0;
  refuses("stop", [&] {
    share_out(
        100000, 1, 3,
        [&](int64_t begin, int64_t) {
          ++done;
          if (begin == 0) throw std::runtime_error("stop");
        },
        start_threads);
  });
  CHECK(done < 100000);
}

}  // namespace
