-- threshold.py as an FPGA core, for frames of 9 x 11 uint16.
-- Generated: change the kernel, not this.
-- SHA-256 of the kernel's file: 7104b588dd8fddfb72be020399e4f99ac256a43c21f06840d0c50bcafc798b11
-- Comments name the lines of that file. Register map and ports: README.md beside.

library ieee;
use ieee.std_logic_1164.all;
use ieee.numeric_std.all;

package hiss_offload is
  -- The low bits; extended by the sign where more are asked for.
  function fit(value : signed; bits : positive) return signed;
  function smin(a, b : signed) return signed;
  function smax(a, b : signed) return signed;
  function pick(test : boolean; yes, no : signed) return signed;
  function b2s(value : boolean) return signed;
end package;

package body hiss_offload is
  function fit(value : signed; bits : positive) return signed is
    constant given : signed(value'length - 1 downto 0) := value;
  begin
    if bits <= given'length then
      return given(bits - 1 downto 0);
    end if;
    return resize(given, bits);
  end function;

  function smin(a, b : signed) return signed is
  begin
    if a < b then
      return a;
    end if;
    return b;
  end function;

  function smax(a, b : signed) return signed is
  begin
    if a > b then
      return a;
    end if;
    return b;
  end function;

  function pick(test : boolean; yes, no : signed) return signed is
  begin
    if test then
      return yes;
    end if;
    return no;
  end function;

  function b2s(value : boolean) return signed is
  begin
    if value then
      return "01";
    end if;
    return "00";
  end function;
end package body;

library ieee;
use ieee.std_logic_1164.all;
use ieee.numeric_std.all;
use work.hiss_offload.all;

entity hiss_threshold is
  port (
    aclk : in std_logic;
    aresetn : in std_logic;
    -- Pixels in, row by row. tuser marks the first pixel of a frame, tlast its last.
    s_axis_tdata : in std_logic_vector(15 downto 0);
    s_axis_tvalid : in std_logic;
    s_axis_tready : out std_logic;
    s_axis_tlast : in std_logic;
    s_axis_tuser : in std_logic;
    -- Results out: feedback of a frame in order, then its verdict with tlast.
    m_axis_tdata : out std_logic_vector(191 downto 0);
    m_axis_tvalid : out std_logic;
    m_axis_tready : in std_logic;
    m_axis_tlast : out std_logic;
    -- Registers, AXI4-Lite.
    s_axil_awaddr : in std_logic_vector(12 downto 0);
    s_axil_awvalid : in std_logic;
    s_axil_awready : out std_logic;
    s_axil_wdata : in std_logic_vector(31 downto 0);
    s_axil_wstrb : in std_logic_vector(3 downto 0);
    s_axil_wvalid : in std_logic;
    s_axil_wready : out std_logic;
    s_axil_bresp : out std_logic_vector(1 downto 0);
    s_axil_bvalid : out std_logic;
    s_axil_bready : in std_logic;
    s_axil_araddr : in std_logic_vector(12 downto 0);
    s_axil_arvalid : in std_logic;
    s_axil_arready : out std_logic;
    s_axil_rdata : out std_logic_vector(31 downto 0);
    s_axil_rresp : out std_logic_vector(1 downto 0);
    s_axil_rvalid : out std_logic;
    s_axil_rready : in std_logic
  );
end entity;

architecture rtl of hiss_threshold is
  type phase_t is (clear, idle, prologue, run, flush, epilogue, closing, skip);
  subtype pixel_t is std_logic_vector(15 downto 0);
  type pixel_row_t is array (0 to 0) of pixel_t;
  type window_t is array (0 to 0) of pixel_row_t;
  signal w_p_low : std_logic_vector(63 downto 0) := x"000000000000000C";  -- as written
  signal p_low : std_logic_vector(15 downto 0) := (others => '0');  -- of this frame
  signal w_p_min_pixels : std_logic_vector(63 downto 0) := x"0000000000000028";  -- as written
  signal p_min_pixels : std_logic_vector(63 downto 0) := (others => '0');  -- of this frame
  type s_hits_t is array (0 to 0) of std_logic_vector(63 downto 0);
  constant s_hits_identity : std_logic_vector(63 downto 0) := "0000000000000000000000000000000000000000000000000000000000000000";
  signal s_hits_shown : s_hits_t := (others => s_hits_identity);
  function at_s_hits(values : s_hits_t; index : signed) return std_logic_vector is
    variable found : std_logic_vector(63 downto 0) := values(0);
  begin
    for i in 1 to 0 loop
      if index = i then found := values(i); end if;
    end loop;
    return found;
  end function;
  type s_histogram_t is array (0 to 63) of std_logic_vector(63 downto 0);
  constant s_histogram_identity : std_logic_vector(63 downto 0) := "0000000000000000000000000000000000000000000000000000000000000000";
  signal s_histogram : s_histogram_t;
  signal s_histogram_read : std_logic_vector(63 downto 0) := (others => '0');
  signal s_histogram_asked : unsigned(5 downto 0) := (others => '0');
  function changed_s_histogram(old : std_logic_vector; op : std_logic_vector; by : signed) return std_logic_vector is
    variable now : signed(63 downto 0);
    variable by_low : signed(63 downto 0);
  begin
    now := signed(old);
    by_low := fit(by, 64);
    case op is
      when "000" => return std_logic_vector(fit(now, 64) + by_low);  -- add
      when others => return old;
    end case;
  end function;
  constant EMITS : positive := 1;
  signal accept : std_logic := '0';
  signal first : std_logic := '1';
  signal result_valid : std_logic := '0';
  -- From the register file to the frames.
  signal hold : std_logic := '0';
  signal ask_clear : std_logic := '0';
  signal ask_apply : std_logic := '1';
  signal ask_forget : std_logic := '0';
  signal set_number : std_logic := '0';
  signal new_number : std_logic_vector(63 downto 0) := (others => '0');
  -- From the frames to the register file.
  signal did_clear : std_logic := '0';
  signal did_apply : std_logic := '0';
  signal held : std_logic := '0';
  signal errors : std_logic_vector(3 downto 0) := (others => '0');
  signal frames_done : unsigned(31 downto 0) := (others => '0');
  signal frames_broken : unsigned(31 downto 0) := (others => '0');
  signal last_verdict : std_logic_vector(1 downto 0) := (others => '0');
  signal frame_shown : std_logic_vector(63 downto 0) := (others => '0');
  signal emitted : unsigned(31 downto 0) := (others => '0');
  signal last_code : std_logic_vector(63 downto 0) := (others => '0');
  signal last_value : std_logic_vector(63 downto 0) := (others => '0');
  signal busy : std_logic := '0';
  -- Handshakes of the register file.
  signal w_ready, b_valid, b_error, r_ready, r_valid : std_logic := '0';
begin
  -- A beat that begins a frame within another is not taken here: the broken frame ends first.
  s_axis_tready <= accept and not (s_axis_tuser and not first);
  m_axis_tvalid <= result_valid;

  frames : process (aclk)
    variable phase : phase_t := clear;
    variable v_n : signed(7 downto 0) := (others => '0');
    variable v_v : signed(16 downto 0) := (others => '0');
    variable s_hits : s_hits_t := (others => s_hits_identity);
    variable s_histogram_on : boolean := false;
    variable s_histogram_at : unsigned(5 downto 0) := (others => '0');
    variable s_histogram_op : std_logic_vector(2 downto 0) := "000";
    variable s_histogram_by : signed(63 downto 0) := (others => '0');
    variable s_histogram_next_on : boolean := false;
    variable s_histogram_next_at : unsigned(5 downto 0) := (others => '0');
    variable s_histogram_next_op : std_logic_vector(2 downto 0) := "000";
    variable s_histogram_next_by : signed(63 downto 0) := (others => '0');
    variable s_histogram_last_on : boolean := false;
    variable s_histogram_last_at : unsigned(5 downto 0) := (others => '0');
    variable s_histogram_last : std_logic_vector(63 downto 0) := (others => '0');
    variable s_histogram_write : boolean;
    variable s_histogram_write_at : unsigned(5 downto 0) := (others => '0');
    variable at_y : signed(4 downto 0) := (others => '0');
    variable at_x : signed(4 downto 0) := (others => '0');
    variable in_x : unsigned(3 downto 0) := (others => '0');
    variable to_come : unsigned(6 downto 0) := (others => '0');
    variable lead : unsigned(0 downto 0) := (others => '0');
    variable clear_at : unsigned(5 downto 0) := (others => '0');
    variable window : window_t := (others => (others => (others => '0')));
    variable frame_number : signed(63 downto 0) := (others => '0');
    variable verdict : std_logic_vector(1 downto 0) := "00";
    variable arrived : pixel_t;
    variable step : boolean;
    variable opening : boolean := false;  -- the next pixel is the first of its frame
    variable broken : boolean := false;
    variable fault : std_logic_vector(3 downto 0) := "0000";
    type words_t is array (0 to EMITS - 1) of signed(63 downto 0);
    variable emit_on : std_logic_vector(0 to EMITS - 1) := (others => '0');
    variable emit_unsigned : std_logic_vector(0 to EMITS - 1) := (others => '0');
    variable emit_code : words_t := (others => (others => '0'));
    variable emit_value : words_t := (others => (others => '0'));
    variable waiting : boolean := false;  -- feedback of the last cycle has not left yet
    variable sending : boolean := false;
  begin
    if rising_edge(aclk) then
      did_clear <= '0';
      did_apply <= '0';
      step := false;
      if ask_forget = '1' then fault(2 downto 0) := "000"; end if;
      if m_axis_tready = '1' then sending := false; end if;
      s_histogram_write := s_histogram_next_on;
      s_histogram_write_at := s_histogram_next_at;
      if s_histogram_next_on then
        if s_histogram_last_on and s_histogram_last_at = s_histogram_next_at then
          s_histogram_last := changed_s_histogram(s_histogram_last, s_histogram_next_op, s_histogram_next_by);
        else
          s_histogram_last := changed_s_histogram(s_histogram_read, s_histogram_next_op, s_histogram_next_by);
        end if;
        s_histogram_last_on := true;
        s_histogram_last_at := s_histogram_next_at;
      elsif phase = clear then
        s_histogram_last := s_histogram_identity;
        s_histogram_last_on := false;
        s_histogram_write := true;
        s_histogram_write_at := clear_at(5 downto 0);
      end if;
      if s_histogram_write then
        s_histogram(to_integer(s_histogram_write_at)) <= s_histogram_last;
      end if;
      s_histogram_on := false;
      case phase is
        when clear =>
          s_hits := (others => s_hits_identity);
          if clear_at = unsigned'("111111") then
            clear_at := (others => '0');
            fault(3) := '0';
            did_clear <= '1';
            phase := idle;
          else
            clear_at := clear_at + 1;
          end if;
        when idle =>
          broken := false;
          if set_number = '1' then frame_number := signed(new_number); end if;
          if ask_clear = '1' and did_clear = '0' then
            phase := clear;
          elsif hold = '0' and s_axis_tvalid = '1' and s_axis_tuser = '1' then
            if ask_apply = '1' then
              p_low <= w_p_low(15 downto 0);
              p_min_pixels <= w_p_min_pixels(63 downto 0);
            end if;
            did_apply <= ask_apply;
            phase := prologue;
          elsif hold = '0' and s_axis_tvalid = '1' then
            fault(2) := '1';
            broken := true;
            phase := skip;
          end if;
        when prologue =>
          v_n := signed'("00000000");  -- line 6
          at_y := (others => '0');
          at_x := (others => '0');
          in_x := (others => '0');
          to_come := unsigned'("1100011");
          lead := unsigned'("0");
          opening := true;
          phase := run;
        when run =>
          if accept = '1' and s_axis_tvalid = '1' then
            if s_axis_tuser = '1' and not opening then
              fault(0) := '1';
              broken := true;
              phase := closing;
            else
              arrived := s_axis_tdata;
              step := true;
              opening := false;
              if to_come = unsigned'("0000001") then
                if s_axis_tlast = '1' then
                  phase := epilogue;
                else
                  fault(1) := '1';
                  broken := true;
                  phase := skip;
                end if;
              elsif s_axis_tlast = '1' then
                fault(0) := '1';
                broken := true;
                phase := closing;
              end if;
              to_come := to_come - 1;
            end if;
          end if;
        when flush =>
          if not waiting then
            arrived := (others => '0');
            step := true;
          end if;
        when epilogue =>
          if not waiting then
            s_hits(0) := std_logic_vector((signed(s_hits(0)) + fit(b2s((v_n >= signed(p_min_pixels))), 64)));  -- line 12
            emit_on(0) := '1';  -- line 13
            emit_code(0) := signed'("0000000000000000000000000000000000000000000000000000000000000001");
            emit_value(0) := fit(v_n, 64);
            emit_unsigned(0) := '0';
            verdict := std_logic_vector(pick((v_n >= signed(p_min_pixels)), signed'("01"), signed'("00")));  -- line 14
            phase := closing;
          end if;
        when closing =>
          if not waiting and not sending then
            m_axis_tdata <= (others => '0');
            m_axis_tdata(159 downto 128) <= std_logic_vector(frame_number(31 downto 0));
            m_axis_tdata(160) <= '1';
            if broken then
              fault(3) := '1';
              m_axis_tdata(161) <= '1';
              frames_broken <= frames_broken + 1;
            else
              m_axis_tdata(169 downto 168) <= verdict;
              last_verdict <= verdict;
              frames_done <= frames_done + 1;
            end if;
            m_axis_tlast <= '1';
            sending := true;
            frame_number := frame_number + 1;
            phase := idle;
          end if;
        when skip =>
          if accept = '1' and s_axis_tvalid = '1' and (s_axis_tlast = '1' or s_axis_tuser = '1') then
            phase := closing;
          end if;
      end case;
      if step then
        window(0)(0) := arrived;
        if true then
          if true then
            if true then
              v_v := signed('0' & window(0)(0));  -- line 9
              v_n := (v_n + fit(b2s((v_v >= signed('0' & p_low))), 8));  -- line 10
              s_histogram_on := true;  -- line 11
              s_histogram_at := unsigned(fit(fit(smin(v_v, signed'("00000000000111111")), 7), 6));
              s_histogram_op := "000";  -- add
              s_histogram_by := signed'("0000000000000000000000000000000000000000000000000000000000000001");
            end if;
          end if;
          if at_x = signed'("01010") then
            at_x := (others => '0');
            if at_y = signed'("01000") then
              if phase = flush then phase := epilogue; end if;
            else
              at_y := at_y + 1;
            end if;
          else
            at_x := at_x + 1;
          end if;
        end if;
      end if;
      waiting := false;
      for i in 0 to EMITS - 1 loop
        if emit_on(i) = '1' then
          if sending then
            waiting := true;
          else
            m_axis_tdata <= (others => '0');
            m_axis_tdata(63 downto 0) <= std_logic_vector(emit_value(i));
            m_axis_tdata(127 downto 64) <= std_logic_vector(emit_code(i));
            m_axis_tdata(159 downto 128) <= std_logic_vector(frame_number(31 downto 0));
            m_axis_tdata(162) <= emit_unsigned(i);
            m_axis_tlast <= '0';
            last_code <= std_logic_vector(emit_code(i));
            last_value <= std_logic_vector(emit_value(i));
            emitted <= emitted + 1;
            emit_on(i) := '0';
            sending := true;
          end if;
        end if;
      end loop;
      if not s_histogram_on then s_histogram_at := s_histogram_asked; end if;
      s_histogram_read <= s_histogram(to_integer(s_histogram_at));
      s_histogram_next_on := s_histogram_on;
      s_histogram_next_at := s_histogram_at;
      s_histogram_next_op := s_histogram_op;
      s_histogram_next_by := s_histogram_by;
      if aresetn = '0' then
        phase := clear;
        clear_at := (others => '0');
        broken := false;
        opening := false;
        waiting := false;
        sending := false;
        emit_on := (others => '0');
        fault := "0000";
        frame_number := (others => '0');
        frames_done <= (others => '0');
        frames_broken <= (others => '0');
        emitted <= (others => '0');
        did_clear <= '0';
        did_apply <= '0';
        s_histogram_next_on := false;
        s_histogram_last_on := false;
      end if;
      s_hits_shown <= s_hits;
      frame_shown <= std_logic_vector(frame_number);
      errors <= fault;
      busy <= '0';
      if phase /= idle and phase /= clear then busy <= '1'; end if;
      held <= '0';
      if phase = idle and hold = '1' and ask_clear = '0' then held <= '1'; end if;
      accept <= '0';
      if (phase = run or phase = skip) and not waiting then accept <= '1'; end if;
      first <= '0';
      if opening then first <= '1'; end if;
      result_valid <= '0';
      if sending then result_valid <= '1'; end if;
    end if;
  end process;

  s_axil_awready <= w_ready;
  s_axil_wready <= w_ready;
  s_axil_bvalid <= b_valid;
  s_axil_bresp <= b_error & '0';
  s_axil_arready <= r_ready;
  s_axil_rvalid <= r_valid;

  registers : process (aclk)
    variable at, read_at : std_logic_vector(s_axil_awaddr'range) := (others => '0');
    variable word, short : std_logic_vector(31 downto 0);
    variable strobe : std_logic_vector(3 downto 0);
    variable long : std_logic_vector(63 downto 0);
    variable reading : natural range 0 to 2 := 0;
    variable r_error : std_logic;
    procedure merge(target : inout std_logic_vector(31 downto 0); given : std_logic_vector(31 downto 0);
                    lanes : std_logic_vector(3 downto 0)) is
    begin
      for i in 0 to 3 loop
        if lanes(i) = '1' then target(8 * i + 7 downto 8 * i) := given(8 * i + 7 downto 8 * i); end if;
      end loop;
    end procedure;
  begin
    if rising_edge(aclk) then
      ask_forget <= '0';
      set_number <= '0';
      if did_clear = '1' then ask_clear <= '0'; end if;
      if did_apply = '1' then ask_apply <= '0'; end if;
      w_ready <= '0';
      if b_valid = '1' and s_axil_bready = '1' then b_valid <= '0'; end if;
      if w_ready = '1' then b_valid <= '1'; end if;
      if w_ready = '0' and b_valid = '0' and s_axil_awvalid = '1' and s_axil_wvalid = '1' then
        w_ready <= '1';
        b_error <= '0';
        at := s_axil_awaddr;
        word := s_axil_wdata;
        strobe := s_axil_wstrb;
        if at(12 downto 2) = "00000000011" then
          if strobe(0) = '1' then
            hold <= word(0);
            if word(1) = '1' then ask_clear <= '1'; end if;
            if word(2) = '1' then ask_apply <= '1'; end if;
            ask_forget <= word(3);
          end if;
        elsif at(12 downto 3) = "0000000110" and held = '1' then
          long := frame_shown; if at(2) = '0' then merge(long(31 downto 0), word, strobe); else merge(long(63 downto 32), word, strobe); end if;
          new_number <= long;
          set_number <= '1';
        elsif at(12 downto 3) = "0000100000" then
          long := w_p_low; if at(2) = '0' then merge(long(31 downto 0), word, strobe); else merge(long(63 downto 32), word, strobe); end if;
          w_p_low <= long;
        elsif at(12 downto 3) = "0000100001" then
          long := w_p_min_pixels; if at(2) = '0' then merge(long(31 downto 0), word, strobe); else merge(long(63 downto 32), word, strobe); end if;
          w_p_min_pixels <= long;
        else
          b_error <= '1';
        end if;
      end if;
      r_ready <= '0';
      if r_valid = '1' and s_axil_rready = '1' then r_valid <= '0'; end if;
      if reading = 0 and r_valid = '0' and r_ready = '0' and s_axil_arvalid = '1' then
        r_ready <= '1';
        read_at := s_axil_araddr;
        reading := 2;
        s_histogram_asked <= unsigned(s_axil_araddr(8 downto 3));
      elsif reading = 2 then
        reading := 1;  -- a memory answers in this cycle
      elsif reading = 1 then
        reading := 0;
        long := (others => '0');
        short := (others => '0');
        r_error := '0';
        if read_at(12 downto 2) = "00000000000" then
          short := x"48495353";
          long := short & short;
        elsif read_at(12 downto 2) = "00000000001" then
          short := x"00000001";
          long := short & short;
        elsif read_at(12 downto 2) = "00000000010" then
          short := x"7104B588";
          long := short & short;
        elsif read_at(12 downto 2) = "00000000011" then
          short := (0 => hold, others => '0');
          long := short & short;
        elsif read_at(12 downto 2) = "00000000100" then
          short := (0 => busy, 1 => held, 2 => ask_clear, 3 => ask_apply, 8 => errors(0), 9 => errors(1), 10 => errors(2), 11 => errors(3), others => '0');
          long := short & short;
        elsif read_at(12 downto 2) = "00000000101" then
          short := std_logic_vector(frames_done);
          long := short & short;
        elsif read_at(12 downto 2) = "00000000110" then
          short := std_logic_vector(frames_broken);
          long := short & short;
        elsif read_at(12 downto 2) = "00000000111" then
          short := (0 => last_verdict(0), 1 => last_verdict(1), others => '0');
          long := short & short;
        elsif read_at(12 downto 2) = "00000001000" then
          short := x"00000009";
          long := short & short;
        elsif read_at(12 downto 2) = "00000001001" then
          short := x"0000000B";
          long := short & short;
        elsif read_at(12 downto 2) = "00000001010" then
          short := x"00000010";
          long := short & short;
        elsif read_at(12 downto 2) = "00000001110" then
          short := std_logic_vector(emitted);
          long := short & short;
        elsif read_at(12 downto 3) = "0000000110" then
          long := frame_shown;
        elsif read_at(12 downto 3) = "0000001000" then
          long := last_code;
        elsif read_at(12 downto 3) = "0000001001" then
          long := last_value;
        elsif read_at(12 downto 3) = "0000100000" then
          long := w_p_low;
        elsif read_at(12 downto 3) = "0000100001" then
          long := w_p_min_pixels;
        elsif read_at(12 downto 3) = "1001000000" then
          long := std_logic_vector(resize(signed(s_hits_shown(0)), 64));
        elsif read_at(12 downto 9) = "1000" then
          long := std_logic_vector(resize(signed(s_histogram_read), 64));
          if held = '0' then r_error := '1'; end if;
        else
          r_error := '1';
        end if;
        if read_at(2) = '0' then s_axil_rdata <= long(31 downto 0); else s_axil_rdata <= long(63 downto 32); end if;
        if r_error = '1' then s_axil_rdata <= (others => '0'); end if;
        s_axil_rresp <= r_error & '0';
        r_valid <= '1';
      end if;
      if aresetn = '0' then
        w_p_low <= x"000000000000000C";
        w_p_min_pixels <= x"0000000000000028";
        hold <= '0';
        ask_clear <= '0';
        ask_apply <= '1';
        w_ready <= '0';
        b_valid <= '0';
        r_ready <= '0';
        r_valid <= '0';
        reading := 0;
      end if;
    end if;
  end process;
end architecture;
